"""A learner that takes, verifies, publishes and commits; it dies, hangs and falls back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dapo_hpc.buffer import messages as msg
from dapo_hpc.records import PolicyVersion
from tests.chaos.history import History
from tests.chaos.network import Client, Fenced, Network, Refused
from tests.chaos.simulation import Life, Simulation, Steps

FETCH_GROUPS = 8


@dataclass
class Checkpoints:
    """On disk, of all learners; the newest may turn out to be damaged."""

    every: int
    retained: list[int] = field(default_factory=lambda: [0])

    def write(self, step: int) -> None:
        self.retained = [*(k for k in self.retained if k < step), step][-2:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    total_steps: int
    train_s: float = 1.0
    poll_s: float = 0.7
    evaluate_every: int = 0
    """Steps; 0: never."""


@dataclass(eq=False)
class SimLearner:
    """One life of the learner."""

    sim: Simulation
    network: Network
    history: History
    checkpoints: Checkpoints
    course: Course
    start_step: int
    is_current: Callable[[SimLearner], bool]
    on_end: Callable[[SimLearner], None]
    """It found itself fenced."""
    life: Life = field(default_factory=Life)
    step: int = 0
    lineage: int = 0
    is_complete: bool = False

    def start(self) -> None:
        self.sim.start(self.life, self._guarded())

    def _guarded(self) -> Steps:
        try:
            yield from self._run()
        except Fenced:
            self.history.counts["learners fenced"] += 1
            self.on_end(self)
        except Refused:
            if self.is_current(self):
                raise
            self.history.counts["learners refused, they woke up too late"] += 1

    def _run(self) -> Steps:
        client = Client(self.network)
        self.step = self.start_step
        asked = msg.RegisterRequest(step=self.step)
        reply = yield from client.call("register", asked, msg.RegisterReply)
        self.lineage = reply.lineage
        self.history.registered(self.lineage)
        yield from self._publish(client)
        while self.step < self.course.total_steps:
            yield from self._take(client, self.step + 1)
            yield self.course.train_s * self.sim.random.uniform(0.5, 1.5)
            self.step += 1
            yield from self._publish(client)
            if self.step % self.checkpoints.every == 0 and self.is_current(self):
                yield from self._save(client)
        yield from self._end(client)

    def _publish(self, client: Client) -> Steps:
        version = PolicyVersion(step=self.step, lineage=self.lineage)
        every = self.course.evaluate_every
        asked = msg.PublishRequest(
            version=version, is_evaluated=every > 0 and self.step % every == 0
        )
        yield from self._ask(client, "publish", asked)

    def _take(self, client: Client, step: int) -> Steps:
        asked = msg.TakeRequest(lineage=self.lineage, step=step, wait_s=0.0)
        while True:
            reply: msg.TakeReply = yield from self._ask(client, "take", asked, msg.TakeReply)
            if reply.groups is not None:
                break
            yield self.course.poll_s
        group_ids = [group.group_id for group in reply.groups]
        groups: list[msg.StoredGroup] = []
        for first in range(0, len(group_ids), FETCH_GROUPS):
            fetch = msg.FetchRequest(group_ids=group_ids[first : first + FETCH_GROUPS])
            got: msg.FetchReply = yield from client.call("fetch", fetch, msg.FetchReply)
            groups += got.groups
        self.history.took(step, self.lineage, groups)

    def _save(self, client: Client) -> Steps:
        self.checkpoints.write(self.step)
        oldest = self.checkpoints.retained[0]
        asked = msg.CommitRequest(lineage=self.lineage, step=oldest)
        self.history.asked_step = max(self.history.asked_step, oldest)
        yield from self._ask(client, "commit", asked)
        self.history.committed(oldest)

    def _end(self, client: Client) -> Steps:
        while True:
            reply = yield from client.call("evaluations", msg.Empty(), msg.EvaluationsReply)
            if not reply.num_pending:
                break
            yield self.course.poll_s
        yield from self._ask(client, "finish", msg.FinishRequest(lineage=self.lineage))
        self.is_complete = True

    def _ask(self, client: Client, verb: str, asked: Any, kind: type = msg.Empty) -> Steps:
        """A call that a fenced learner must not get an answer to."""
        newest = max(self.history.lineages)
        reply = yield from client.call(verb, asked, kind)
        if newest > self.lineage:
            self.history.problems.append(
                f"unfenced: {verb} of lineage {self.lineage} was answered, called after lineage "
                f"{newest} had registered."
            )
        return reply
