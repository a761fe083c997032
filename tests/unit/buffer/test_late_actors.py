"""Actors that do not know yet what the buffer decided: told, not refused, and not misled."""

from __future__ import annotations

import pytest

from dapo_hpc.buffer import events as ev
from dapo_hpc.buffer import messages as msg
from dapo_hpc.buffer.group import LeaseEnd
from dapo_hpc.buffer.service import is_quick
from dapo_hpc.records import Lease, PolicyVersion
from tests.buffer_world import World, make_prompts, piece


def lease_with_tokens(world: World, version: PolicyVersion) -> Lease:
    """One open group of which 40 tokens are acknowledged; the others are answered."""
    leases = [lease for lease in world.lease(version=version) if lease.kind == "train"]
    late = leases[-1]
    world.heartbeat(late.lease_id, [piece(0, 0, 40, version)], [0])
    for lease in leases[:-1]:
        world.answer(lease)
    return late


@pytest.mark.parametrize("cause", ["aborted", "expired"])
def test_tokens_dropped_as_too_old_are_not_an_actors_mistake(cause: LeaseEnd) -> None:
    """Its next heartbeat goes on from tokens that the buffer has dropped in the meantime."""
    world = World(make_prompts(40), max_staleness=1)
    first = world.start()
    late = lease_with_tokens(world, first)
    desk = world.core.desk
    desk.end_lease(desk.book.state.leases[late.lease_id], cause)
    desk.emit(ev.PartialsDropped(group_id=late.group_id))
    reply = world.heartbeat(late.lease_id, [piece(0, 40, 10, first)], [40])
    assert late.lease_id in (*reply.abort, *reply.lost)
    assert desk.book.state.groups[late.group_id].known_tokens(0) == 0
    assert world.core.check() == []


def test_a_gap_in_a_live_lease_is_an_actors_mistake() -> None:
    world = World(make_prompts(40), max_staleness=1)
    first = world.start()
    late = lease_with_tokens(world, first)
    with pytest.raises(ValueError, match="starts at token 50, but only 40 are stored"):
        world.heartbeat(late.lease_id, [piece(0, 50, 10, first)], [50])


def test_an_actor_that_samples_training_responses_is_not_sent_back_to_an_old_version() -> None:
    world = World(make_prompts(40), max_staleness=1)
    first = world.start(is_evaluated=True)
    world.fill(1)
    second = world.publish(1)
    world.tick(40)
    held = lease_with_tokens(world, second)
    while world.core.desk.num_wanted():
        lease = next(x for x in world.lease("b", second) if x.kind == "train")
        world.answer(lease, actor="b")
    assert world.core.desk.waiting("eval", first), "the old version has evaluation work left"
    assert held.lease_id in [x.lease_id for x in world.core.desk.live_leases("a")]
    assert world.ask("a", second, free=0).newest == second
    assert world.ask("b", second, free=0).newest == first


@pytest.mark.parametrize(
    ("num_tokens", "lost", "expected"), [(0, [], True), (3, [], False), (0, [1], False)]
)
def test_only_a_heartbeat_that_promises_nothing_is_quick(
    num_tokens: int, lost: list[int], expected: bool
) -> None:
    """A repeated one has tokens that may not be on disk; a zombie would know of fewer leases."""
    version = PolicyVersion(step=0, lineage=1)
    pieces = [piece(0, 0, num_tokens, version)] if num_tokens else []
    progress = msg.LeaseProgress(lease_id=1, new_tokens=pieces, offsets=[0] * len(pieces))
    asked = msg.HeartbeatRequest(
        actor="a", version=version, leases=[progress], stats=msg.ActorStats()
    )
    reply = msg.HeartbeatReply(lost=lost, abort=[], newest=version, is_done=False)
    assert is_quick(asked, reply) is expected
