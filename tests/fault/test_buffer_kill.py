"""The real buffer process is killed in the middle of real traffic; afterwards every book closes."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dapo_hpc.buffer import messages as msg
from dapo_hpc.buffer.client import BufferClient
from dapo_hpc.buffer.ledger import Ledger
from dapo_hpc.buffer.owner import inherit_ledger, take_ownership
from dapo_hpc.buffer.server import replay
from dapo_hpc.records import Lease, PolicyVersion
from tests.buffer_process import BufferProcess, client_of, make_run
from tests.buffer_world import piece, response, submission

NUM_KILLS = 4
NUM_ACTORS = 3


@dataclass
class Actor:
    """Leases, reports tokens, submits; notes what was acknowledged."""

    name: str
    client: BufferClient
    seed: int
    acked: dict[tuple[int, int], str] = field(default_factory=dict)
    """(group, index) -> sha256 of the response the buffer said it stored."""
    error: BaseException | None = None

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # the test's thread raises it
            self.error = error

    def _work(self) -> None:
        draw = random.Random(self.seed)
        version: PolicyVersion | None = None
        while True:
            reply = self.client.lease(
                msg.LeaseRequest(
                    actor=self.name,
                    version=version,
                    max_responses=6,
                    wait_s=0.5,
                    stats=msg.ActorStats(generated_tokens=len(self.acked)),
                )
            )
            if reply.is_done:
                return
            for lease in reply.leases:
                assert version is not None, "work comes to actors with weights"
                self._sample(lease, version, draw)
            version = reply.newest or version

    def _sample(self, lease: Lease, version: PolicyVersion, draw: random.Random) -> None:
        if draw.random() < 0.5:
            self._report(lease, version, draw.randint(1, 5))
        if draw.random() < 0.1:
            progress = msg.LeaseProgress(lease_id=lease.lease_id, new_tokens=[], offsets=[])
            self.client.release(
                msg.ReleaseRequest(actor=self.name, leases=[progress], is_failure=False)
            )
            return
        is_uniform = draw.random() < 0.3
        for part in lease.missing:
            done = response(
                part.index,
                lease.version or version,
                is_correct=is_uniform or part.index == 0,
                num_tokens=draw.randint(5, 2000),
                prefix=part,
            )
            verdicts = self.client.submit(submission(lease.lease_id, [done], self.name)).verdicts
            if verdicts == [["stored"]] and lease.kind == "train":
                digest = hashlib.sha256(msg.encode(done)).hexdigest()
                self.acked[lease.group_id, part.index] = digest

    def _report(self, lease: Lease, version: PolicyVersion, num_tokens: int) -> None:
        first = lease.missing[0]
        offset = len(first.token_ids)
        progress = msg.LeaseProgress(
            lease_id=lease.lease_id,
            new_tokens=[piece(first.index, offset, num_tokens, lease.version or version)],
            offsets=[offset],
        )
        self.client.heartbeat(
            msg.HeartbeatRequest(
                actor=self.name, version=version, leases=[progress], stats=msg.ActorStats()
            )
        )


@dataclass
class Learner:
    """Takes and publishes as fast as it can until told to stop; then finishes the run."""

    client: BufferClient
    stop: threading.Event
    taken: dict[int, list[int]] = field(default_factory=dict)
    digests: dict[tuple[int, int], str] = field(default_factory=dict)
    """(group, index) -> sha256 of what was fetched for training."""
    error: BaseException | None = None

    def run(self) -> None:
        try:
            self._train()
        except BaseException as error:  # the test's thread raises it
            self.error = error

    def _train(self) -> None:
        lineage = self.client.register(0)
        self.client.publish(PolicyVersion(step=0, lineage=lineage), is_evaluated=True)
        step = 1
        while not self.stop.is_set():
            groups = None
            while groups is None:
                groups = self.client.take(lineage, step, 1.0).groups
            self.taken[step] = [group.group_id for group in groups]
            for group in self.client.fetch(self.taken[step]):
                for one in group.responses:
                    digest = hashlib.sha256(msg.encode(one)).hexdigest()
                    self.digests[group.group_id, one.index] = digest
            version = PolicyVersion(step=step, lineage=lineage)
            self.client.publish(version, is_evaluated=step % 3 == 0)
            if step % 3 == 0:
                self.client.commit(lineage, step - 1)
            step += 1
        while self.client.evaluations().num_pending:
            time.sleep(0.05)
        self.client.finish(lineage)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[BufferProcess]:
    run = make_run(tmp_path, run__total_steps=100_000, buffer__lease_s=2.0)
    process = BufferProcess(run)
    process.start()
    yield process
    process.kill()


def test_killed_in_the_middle_of_traffic(process: BufferProcess) -> None:
    run = process.run
    learner = Learner(client_of(run, give_up_s=60), threading.Event())
    actors = [Actor(f"actor-{i}", client_of(run, give_up_s=60), i) for i in range(NUM_ACTORS)]
    threads = [threading.Thread(target=x.run, daemon=True) for x in (learner, *actors)]
    for thread in threads:
        thread.start()
    draw = random.Random(11)
    for _ in range(NUM_KILLS):
        before = len(learner.taken)
        _wait_for(lambda before=before: len(learner.taken) > before, learner, actors)
        time.sleep(draw.uniform(0.0, 0.3))
        process.kill()
        process.start()
    learner.stop.set()
    for thread in threads:
        thread.join(90)
    assert [x.error for x in (learner, *actors)] == [None] * (1 + NUM_ACTORS)
    assert not any(thread.is_alive() for thread in threads)
    assert process.stop() == 0
    _assert_accounts_close(process, learner, actors)


def _wait_for(is_reached: object, learner: Learner, actors: list[Actor]) -> None:
    deadline = time.monotonic() + 60
    while not is_reached():  # type: ignore[operator]
        errors = [x.error for x in (learner, *actors) if x.error is not None]
        assert not errors, errors
        assert time.monotonic() < deadline, f"stuck after steps {list(learner.taken)}"
        time.sleep(0.02)


def _assert_accounts_close(process: BufferProcess, learner: Learner, actors: list[Actor]) -> None:
    assert "invariant violated" not in process.log.read_text()
    acked = {key: digest for actor in actors for key, digest in actor.acked.items()}
    taken = [group_id for step in sorted(learner.taken) for group_id in learner.taken[step]]
    assert len(taken) == len(set(taken)), "nothing is trained twice"
    assert all(len(group_ids) == 2 for group_ids in learner.taken.values())
    for key, digest in learner.digests.items():
        assert acked.get(key) == digest, f"response {key} was trained, but is not what was sent"
    book = replay(Ledger(_copy_of_the_ledger(process)))
    counters = book.state.counters
    assert counters["responses_accepted"] >= len(acked)
    for (group_id, index), digest in acked.items():
        group = book.state.groups.get(group_id)
        if group is not None and group.state in ("open", "ready", "taken"):
            assert group.responses[index].sha256.hex() == digest, "an acknowledged response is lost"
    assert [r.accuracy for r in book.state.results], "evaluations finished"


def _copy_of_the_ledger(process: BufferProcess) -> Path:
    owner = take_ownership(process.run.buffer)
    inherit_ledger(owner, 0.0)
    assert owner.incarnation == NUM_KILLS + 2
    assert os.listdir(owner.ledger)
    return owner.ledger
