"""A heartbeat is small: it costs one record, and waits for no upload."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from dapo_hpc.buffer import messages as msg
from dapo_hpc.buffer import service as service_module
from dapo_hpc.buffer.gate import Room
from dapo_hpc.records import PolicyVersion
from tests.buffer_process import client_of, make_run
from tests.buffer_served import ServedBuffer
from tests.buffer_world import World, piece, response

NUM_STUCK = 7
QUICK_S = 1.0
"""On a busy machine; a body that does not arrive is waited for 60 times as long."""


def test_a_heartbeat_is_one_record_and_one_event() -> None:
    world = World()
    version = world.start()
    (lease, *_) = world.lease()
    events, records = len(world.disk), len(world.records)
    world.heartbeat(lease.lease_id, [piece(0, 0, 5, version), piece(1, 0, 3, version)], [0, 0])
    assert (len(world.disk) - events, len(world.records) - records) == (1, 1)


def test_a_record_goes_with_the_last_of_its_responses() -> None:
    world = World()
    version = world.start()
    (lease, *_) = world.lease()
    world.heartbeat(lease.lease_id, [piece(0, 0, 5, version), piece(1, 0, 3, version)], [0, 0])
    world.heartbeat(lease.lease_id, [piece(1, 3, 4, version)], [3])
    partials = set(world.records)
    world.submit(lease.lease_id, [response(0, version, num_tokens=9)])
    assert partials <= set(world.records)
    world.submit(lease.lease_id, [response(1, version, is_correct=False, num_tokens=9)])
    assert not partials & set(world.records)
    assert world.core.check() == []


def test_the_next_actor_gets_the_tokens_of_all_heartbeats() -> None:
    world = World()
    version = world.start()
    (lease, *_) = world.lease()
    world.heartbeat(lease.lease_id, [piece(0, 0, 5, version), piece(1, 0, 3, version)], [0, 0])
    world.heartbeat(lease.lease_id, [piece(1, 3, 4, version)], [3])
    world.crash()
    world.release(lease.lease_id, is_failure=False)
    again = next(x for x in world.lease("b") if x.group_id == lease.group_id)
    assert [part.token_ids.tolist() for part in again.missing] == [
        list(range(5)),
        list(range(7)),
    ]


def test_heartbeats_are_answered_while_large_bodies_are_stuck(tmp_path: Path) -> None:
    served = ServedBuffer(make_run(tmp_path))
    served.start()
    client = client_of(served.run)
    version = PolicyVersion(step=0, lineage=client.register(0))
    client.publish(version, is_evaluated=False)
    asked = msg.LeaseRequest(
        actor="a", version=version, max_responses=2, wait_s=0.0, stats=msg.ActorStats()
    )
    (lease,) = client.lease(asked).leases
    head = (
        "POST /v1/submit HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {served.token}\r\nContent-Length: {2**27}\r\n\r\n"
    )
    with ExitStack() as stack:
        for _ in range(NUM_STUCK):
            stuck = stack.enter_context(served.connection())
            stuck.sendall(head.encode() + bytes(2**20))
        began = time.monotonic()
        progress = msg.LeaseProgress(
            lease_id=lease.lease_id, new_tokens=[piece(0, 0, 5, version)], offsets=[0]
        )
        client.heartbeat(
            msg.HeartbeatRequest(
                actor="a", version=version, leases=[progress], stats=msg.ActorStats()
            )
        )
        assert time.monotonic() - began < QUICK_S
    client.close()
    served.stop()
    assert served.fatal == []


def test_a_commit_is_a_snapshot_only_when_the_events_outweigh_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = ServedBuffer(make_run(tmp_path))
    served.start()
    service = served.service
    assert service._state_if_due(is_commit=True) is not None
    assert service._state_if_due(is_commit=True) is None
    service._event_bytes = service._snapshot_bytes
    assert service._state_if_due(is_commit=False) is None
    assert service._state_if_due(is_commit=True) is not None
    monkeypatch.setattr(service_module, "SNAPSHOT_EVENTS", 0)
    assert service._state_if_due(is_commit=False) is not None
    served.stop()


def test_room_is_given_in_order_and_all_of_it_to_what_is_larger() -> None:
    asyncio.run(_share_room())


async def _share_room() -> None:
    room = Room(10)
    order: list[int] = []
    may_go = {size: asyncio.Event() for size in (6, 20, 3, 4)}

    async def hold(size: int) -> None:
        async with room.held(size):
            order.append(size)
            await may_go[size].wait()

    tasks = [asyncio.create_task(hold(size)) for size in may_go]
    await asyncio.sleep(0)
    assert order == [6]
    may_go[6].set()
    await asyncio.sleep(0.01)
    assert order == [6, 20]
    may_go[20].set()
    await asyncio.sleep(0.01)
    assert order == [6, 20, 3, 4]
    may_go[3].set()
    may_go[4].set()
    await asyncio.gather(*tasks)
    assert room._held == 0
