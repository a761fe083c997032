"""Signals at random moments, spread evenly over the groups to be trained."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkProcess
from pathlib import Path

from dapo_hpc.run_dir import RunDir
from tests.buffer_process import BufferProcess
from tests.campaign import sampler, trainer

LIMIT_S = 120.0
"""Nothing in a campaign may stand still longer than this."""
JITTER_S = 0.1
LAST_KILL_AT = 0.8
"""Share of the groups trained at the last kill; the rest runs in peace."""
TRAINER_JITTER_S = 2.0
"""The trainer is hit anywhere between two checkpoints, not only behind one."""
ODDS = {
    "kill actor": 70,
    "kill buffer": 14,
    "kill trainer": 6,
    "pause actor": 6,
    "pause buffer": 3,
    "replace buffer": 1,
}
"""Relative frequency of what happens."""


@dataclass(slots=True)
class Lives:
    """One name, one process at a time; each life is forked from this process."""

    name: str
    target: Callable[[int], None]
    log: Path
    count: int = 0
    process: ForkProcess | None = None
    asleep_until: float | None = None

    def start(self) -> None:
        self.count += 1
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=self._live, args=(self.count,), name=self.name)
        self.process.start()

    def _live(self, life: int) -> None:
        """In the child: what it says goes to its log, and its own children are not its parent's."""
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, sys.stderr.fileno())
        self.target(life)

    def signal(self, number: int) -> None:
        assert self.process is not None
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        assert self.process is not None
        self.signal(signal.SIGKILL)
        self.process.join()
        self.asleep_until = None

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    def check(self) -> None:
        """A process that nobody killed may only end well."""
        assert self.process is not None
        code = self.process.exitcode
        assert code in (None, 0), f"{self.name}, life {self.count}: exit {code}\n{self.last_words}"

    @property
    def last_words(self) -> str:
        return self.log.read_text()[-3000:] if self.log.exists() else ""


@dataclass(kw_only=True)
class Campaign:
    """All processes of one run directory, and the one that hits them."""

    run: RunDir
    seed: int
    num_actors: int
    num_groups: int
    num_kills: int
    batch_groups: int
    lease_s: float
    prelude: str = ""
    """Python that each buffer process runs first: plants a bug."""
    say: Callable[[str], None] = print
    kills: Counter[str] = field(default_factory=Counter)
    buffer_killed_at: list[float] = field(default_factory=list)
    """time.monotonic() of each SIGKILL of the buffer; all processes share that clock."""

    def fight(self) -> None:
        """Until the trainer has finished. Raises AssertionError when anything stands still."""
        draw = random.Random(self.seed)
        self.buffer = BufferProcess(self.run, self.prelude)
        self.buffer.start()
        logs = self.run.root / "process_logs"
        logs.mkdir()
        self.trainer = Lives("trainer", self._train, logs / "trainer.log")
        self.actors = [
            Lives(f"actor-{i}", self._sampler_of(f"actor-{i}"), logs / f"actor-{i}.log")
            for i in range(self.num_actors)
        ]
        for lives in (self.trainer, *self.actors):
            lives.start()
        try:
            self._strike(draw)
            self._end()
        finally:
            self._clean_up()

    def _train(self, life: int) -> None:
        trainer.main(self.run.root, life, lambda step, size: step * size >= self.num_groups)

    def _sampler_of(self, name: str) -> Callable[[int], None]:
        return lambda life: sampler.main(self.run.root, name, life, self.seed)

    def _strike(self, draw: random.Random) -> None:
        events = Counter[str]()
        began = time.monotonic()
        while self._wait_for_progress(self._next_kill_at()):
            time.sleep(draw.uniform(0, JITTER_S))
            if not self.trainer.is_alive:
                break
            event = draw.choices(list(ODDS), list(ODDS.values()))[0]
            events[event] += 1
            self._do(event, draw)
            self._look_after_all()
            if sum(events.values()) % 50 == 0:
                self._report(began)

    def _next_kill_at(self) -> float:
        """Share of the groups trained; beyond 1 when enough were killed."""
        count = self.kills.total() - self.kills["replaced"]
        return LAST_KILL_AT * count / self.num_kills if count < self.num_kills else math.inf

    def _do(self, event: str, draw: random.Random) -> None:
        match event:
            case "kill actor":
                self._kill(draw.choice(self.actors), "actor")
            case "kill trainer":
                time.sleep(draw.uniform(0, TRAINER_JITTER_S))
                self._kill(self.trainer, "trainer")
            case "kill buffer":
                self.buffer_killed_at.append(time.monotonic())
                self.buffer.kill()
                self.kills["buffer"] += 1
                self.buffer.start()
            case "pause actor":
                actor = draw.choice(self.actors)
                if actor.is_alive and actor.asleep_until is None:
                    actor.signal(signal.SIGSTOP)
                    actor.asleep_until = time.monotonic() + draw.uniform(0.5, 2.5) * self.lease_s
            case "pause buffer":
                self.buffer.signal(signal.SIGSTOP)
                time.sleep(draw.uniform(0.1, 1.0))
                self.buffer.signal(signal.SIGCONT)
            case "replace buffer":
                self._replace_buffer()

    def _kill(self, lives: Lives, role: str) -> None:
        if lives.is_alive:
            lives.kill()
            self.kills[role] += 1
            lives.start()

    def _replace_buffer(self) -> None:
        """A successor starts while the owner sleeps; the owner wakes up and must leave."""
        old = self.buffer
        old.signal(signal.SIGSTOP)
        self.buffer = BufferProcess(self.run, self.prelude)
        self.buffer.start()
        old.signal(signal.SIGCONT)
        assert old.wait(30) != 0, "the buffer that was replaced while it slept must not go on"
        self.kills["replaced"] += 1

    def _look_after_all(self) -> None:
        for actor in self.actors:
            if actor.asleep_until is not None and time.monotonic() > actor.asleep_until:
                actor.signal(signal.SIGCONT)
                actor.asleep_until = None
            actor.check()
        self.trainer.check()

    def progress(self) -> float:
        """Share of the groups that are safely trained."""
        path = self.run.root / "checkpoints.json"
        step = json.loads(path.read_text())[-1] if path.exists() else 0
        return float(step * self.batch_groups / self.num_groups)

    def _wait_for_progress(self, share: float) -> bool:
        """False when the trainer has finished."""
        last, seen = time.monotonic(), self.progress()
        while self.trainer.is_alive and self.progress() < share:
            if self.progress() > seen:
                last, seen = time.monotonic(), self.progress()
            assert time.monotonic() < last + LIMIT_S, f"stuck at {seen:.1%}\n{self._words()}"
            self._look_after_all()
            time.sleep(0.02)
        self.trainer.check()
        return self.trainer.is_alive

    def _words(self) -> str:
        return self.trainer.last_words + self.buffer.log.read_text()[-3000:]

    def _report(self, began: float) -> None:
        share = self.progress()
        passed = time.monotonic() - began
        left = f"{passed * (1 - share) / share:.0f} s left" if share else "time left unknown"
        self.say(f"{share:6.1%} trained, {dict(self.kills)}, {passed:.0f} s, {left}")

    def _end(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        for lives in (self.trainer, *self.actors):
            if lives.asleep_until is not None:
                lives.signal(signal.SIGCONT)
            assert lives.process is not None
            lives.process.join(max(0.1, deadline - time.monotonic()))
            assert not lives.is_alive, f"{lives.name} never heard of the end\n{lives.last_words}"
            lives.check()
        assert self.buffer.stop() == 0, self.buffer.log.read_text()[-3000:]

    def _clean_up(self) -> None:
        for lives in (self.trainer, *self.actors):
            if lives.is_alive:
                lives.kill()
        self.buffer.kill()
