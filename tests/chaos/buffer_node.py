"""One life of the buffer process: the real core, writer, ledger, segments and owner on a fake disk.

What `dapo_hpc.buffer.service` does in an event loop happens here in virtual time.
"""

from __future__ import annotations

import errno
import sqlite3
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dapo_hpc.buffer import events as ev
from dapo_hpc.buffer import messages as msg
from dapo_hpc.buffer import owner
from dapo_hpc.buffer.book import Book
from dapo_hpc.buffer.core import BufferSettings, Core, LineageFenced, Prompts
from dapo_hpc.buffer.owner import OwnerFenced, Ownership
from dapo_hpc.buffer.server import inherit
from dapo_hpc.buffer.service import OWNER_S, is_quick
from dapo_hpc.buffer.writer import FULL_RETRY_S, DiskFull, Job, Store, Writer
from tests.chaos import disk as fake
from tests.chaos.network import TIMEOUT_S, Network, Outcome
from tests.chaos.simulation import Answer, Simulation

GATHER_S = 0.02
TICK_S = 0.5


@dataclass(slots=True)
class Machine:
    """What all lives of the buffer share."""

    sim: Simulation
    network: Network
    directory: Path
    settings: BufferSettings
    prompts: Prompts
    problems: list[str]
    counts: Counter[str]
    check_every: int
    """Group commits from one check of the invariants to the next."""
    active: fake.Disk | None = None
    """The disk of the process that is running."""


Handler = Callable[[Core, Any, float, str], Any]
VERBS: dict[str, tuple[type, Handler]] = {
    "lease": (msg.LeaseRequest, lambda core, asked, now, call: core.lease(asked, now, call)),
    "heartbeat": (msg.HeartbeatRequest, lambda core, asked, now, _: core.heartbeat(asked, now)),
    "submit": (msg.SubmitRequest, lambda core, asked, now, _: core.submit(asked, now)),
    "release": (msg.ReleaseRequest, lambda core, asked, now, _: core.release(asked, now)),
    "register": (msg.RegisterRequest, lambda core, asked, now, _: core.register(asked, now)),
    "take": (msg.TakeRequest, lambda core, asked, now, _: core.take(asked, now)),
    "fetch": (msg.FetchRequest, lambda core, asked, _, __: core.fetch(asked)),
    "publish": (msg.PublishRequest, lambda core, asked, now, _: core.publish(asked, now)),
    "commit": (msg.CommitRequest, lambda core, asked, now, _: core.commit(asked, now)),
    "evaluations": (msg.Empty, lambda core, _, now, __: core.evaluations(now)),
    "finish": (msg.FinishRequest, lambda core, asked, _, __: core.finish(asked)),
}


class BufferNode:
    """Serves from `open` until it is killed, is fenced, or ends itself."""

    def __init__(self, machine: Machine, *, is_alone: bool) -> None:
        """`is_alone`: no predecessor can still run."""
        self.machine = machine
        self.sim = machine.sim
        self.disk = fake.Disk(machine.sim.random, self._stop_here)
        self.is_dead = False
        self.is_stopped = False
        self.is_serving = False
        self.core: Core | None = None
        self.owned: Ownership | None = None
        self._store: Store | None = None
        self._writer: Writer | None = None
        self._inbox: list[Callable[[], None]] = []
        self._group: list[Job] = []
        """Taken from the writer's queue and not on disk yet."""
        self._is_flush_due = False
        self._stopped_piece: fake.Stoppable | None = None
        self._num_commits = 0
        self._owner_at = 0.0
        self._execute(self._take_ownership)
        wait_s = 0.0 if is_alone else owner.GRACE_FRAC * TIMEOUT_S
        self.sim.after(wait_s, lambda: self._when_running(self._open))

    # life

    def _take_ownership(self) -> None:
        self.owned = owner.take_ownership(self.machine.directory)

    def _open(self) -> None:
        assert self.owned is not None
        self.owned.check()
        self._store, book = inherit(self.owned, 0.0, sleep=lambda _: None)
        self._serve(book)

    def _serve(self, book: Book) -> None:
        assert self._store is not None
        assert self.owned is not None
        machine = self.machine
        self._writer = Writer(
            self._store, self.owned.check, _never, full_mark=machine.directory / "DISK_FULL"
        )
        self.core = Core(
            machine.settings, machine.prompts, self._store.read, now=self.sim.now, book=book
        )
        machine.network.endpoint = self
        self.is_serving = True
        self.sim.after(TICK_S, self._keep_time)

    def stop(self, seconds: float) -> None:
        """SIGSTOP between two pieces of work."""
        if not (self.is_dead or self.is_stopped):
            self.is_stopped = True
            self.sim.after(seconds, self.go_on)

    def _stop_here(self) -> None:
        """SIGSTOP in the middle of a piece of work."""
        assert self._stopped_piece is not None
        self.machine.counts["buffer stopped in a write"] += 1
        self.is_stopped = True
        self.sim.after(self.sim.random.uniform(0.5, 15.0), self.go_on)
        self._stopped_piece.stop()
        self.machine.active = self.disk

    def go_on(self) -> None:
        """SIGCONT."""
        if self.is_dead or not self.is_stopped:
            return
        self.is_stopped = False
        piece = self._stopped_piece
        if piece is not None:
            piece.go_on()
            self.machine.active = None
            self._stopped_piece = None if piece.is_done else piece
        while self._inbox and not (self.is_stopped or self.is_dead):
            self._execute(self._inbox.pop(0))

    def crash(self, *, has_power: bool = True) -> None:
        """SIGKILL, or the node's power fails."""
        if self.is_dead:
            return
        self.is_dead = True
        piece, self._stopped_piece = self._stopped_piece, None
        if piece is not None and self.is_stopped:
            piece.go_on(is_killed=True)
        if not has_power:
            self.disk.lose_unsynced()
        if self._store is not None:
            assert self.owned is not None
            fake.keep_ledger(self.owned.ledger, self._store.close)
        self.core = self._store = self._writer = None

    def _when_running(self, action: Callable[[], None]) -> None:
        """Now, or when the process runs again."""
        if self.is_stopped:
            self._inbox.append(action)
        elif not self.is_dead:
            self._execute(action)

    def _execute(self, action: Callable[[], None]) -> None:
        """Run a piece of the process; a planned fault may end or stop it."""
        self.machine.active = self.disk
        if self.disk.plan is not None and self.disk.plan.kind == "stop":
            piece = fake.Stoppable(lambda: self._guarded(action))
            self._stopped_piece = piece
            piece.start()
            if piece.is_done:
                self._stopped_piece = None
        else:
            self._guarded(action)
        self.machine.active = None

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except fake.Killed as killed:
            self.machine.counts["buffer killed in a write"] += 1
            self.crash(has_power=killed.has_power)
        except Exception as error:  # the process logs it and exits
            self._note_exit(error)
            self.crash()

    def _note_exit(self, error: Exception) -> None:
        if isinstance(error, OwnerFenced) or self._has_successor():
            self.machine.counts["buffer fenced"] += 1
        elif getattr(error, "errno", None) in (errno.EIO, errno.ENOSPC) or isinstance(
            error, sqlite3.OperationalError
        ):
            self.machine.counts["buffer exits on a disk error"] += 1
        else:
            self.machine.problems.append(f"the buffer ended itself: {error!r}")

    def _has_successor(self) -> bool:
        """Its files may be gone."""
        number = self.owned.incarnation if self.owned else 0
        return number > 0 and (self.machine.directory / f"owner.{number + 1}").exists()

    # service

    def receive(self, verb: str, body: bytes, call_id: str, answer: Answer) -> None:
        self._when_running(partial(self._handle, verb, body, call_id, answer))

    def _handle(self, verb: str, body: bytes, call_id: str, answer: Answer) -> None:
        assert self.core is not None
        kind, handler = VERBS[verb]
        asked = msg.decode(body, kind)
        refusal: Outcome | None = None
        reply: Any = None
        try:
            reply = handler(self.core, asked, self.sim.now, call_id)
        except LineageFenced as error:
            refusal = Outcome("fenced", text=str(error))
        except ValueError as error:
            refusal = Outcome("refused", text=str(error))
        outcome = refusal or Outcome("ok", msg.encode(msg.Empty() if reply is None else reply))
        self._hand_over(partial(answer.give, outcome), is_snapshot=verb == "commit")
        if verb == "heartbeat" and refusal is None and is_quick(asked, reply):
            answer.give(outcome)

    def _hand_over(self, done: Callable[[], None], *, is_snapshot: bool) -> None:
        assert self.core is not None
        effects = self.core.take_effects()
        self._put(
            Job(
                events=[ev.encode_event(event) for event in effects.events],
                payloads=effects.payloads,
                freed=effects.freed,
                snapshot=self.core.book.snapshot() if is_snapshot else None,
                done=done,
            )
        )

    def _put(self, job: Job) -> None:
        assert self._writer is not None
        self._writer.put(job)
        if not self._is_flush_due:
            self._is_flush_due = True
            self.sim.after(self.sim.random.uniform(0.0, GATHER_S), self._flush_when_running)

    def _flush_when_running(self) -> None:
        self._when_running(self._flush)

    def _flush(self) -> None:
        """One group commit, as the writer's thread does it."""
        assert self._writer is not None
        jobs = self._group or self._writer.take()
        try:
            self._writer.attempt(jobs)
        except DiskFull:
            self.machine.counts["group commits put off, disk full"] += 1
            self._group = jobs
            self.sim.after(FULL_RETRY_S, self._flush_when_running)
            return
        for job in jobs:
            job.done()
        self._check_now_and_then()
        self._group = self._writer.take()
        self._is_flush_due = bool(self._group)
        if self._is_flush_due:
            self.sim.after(self.sim.random.uniform(0.0, GATHER_S), self._flush_when_running)

    def _check_now_and_then(self) -> None:
        self._num_commits += 1
        if self._num_commits % self.machine.check_every == 0 and self.core is not None:
            self.machine.counts["invariant checks"] += 1
            self.machine.problems += [f"invariant: {text}" for text in self.core.check()]

    def _keep_time(self) -> None:
        if not self.is_dead:
            self._when_running(self._tick)
            self.sim.after(TICK_S, self._keep_time)

    def _tick(self) -> None:
        assert self.core is not None
        self.core.tick(self.sim.now)
        if self.core.desk.events or self.core.desk.notices:
            self._hand_over(_nobody_waits, is_snapshot=False)
        if self.sim.now >= self._owner_at + OWNER_S:
            self._owner_at = self.sim.now
            self._put(Job.nothing())


def _nobody_waits() -> None:
    """The end of a job that answers nobody."""


def _never(error: BaseException) -> None:
    raise AssertionError("the writer's thread does not run here") from error
