"""Scores responses in worker processes, each response within a time limit.

A scorer that takes too long is killed with its process and the response counts as wrong; a scorer
that raises counts as wrong; a worker that dies for another reason is replaced and its response is
scored again. The actor never waits for any of it.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

import msgspec

from dapo_hpc.config import RewardSection
from dapo_hpc.reward.worker import READY, Outcome, Task
from dapo_hpc.signals import blocked_in_children

STARTUP_LIMIT_S = 120.0
"""A worker that is not ready by then is killed and replaced."""
MAX_TRIES = 3
"""Deaths of a worker that one response may cause before it counts as wrong; also the number of
workers that may die in a row before any is ready."""

_log = logging.getLogger(__name__)
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Outcome)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The raw outcome of one response."""

    is_correct: bool
    is_timeout: bool = False


@dataclass(slots=True)
class _Job:
    key: str
    task: Task
    num_deaths: int = 0


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection[bytes, bytes]
    deadline_s: float
    is_ready: bool = False
    job: _Job | None = None
    cpu_s: float = 0.0


class ScoringPool:
    """`config.workers` scoring processes, and one thread that feeds and watches them.

    Concurrency: `submit` may be called from any thread and returns at once. `on_scored` is called
    from the pool's thread and must return soon.
    """

    def __init__(self, config: RewardSection, on_scored: Callable[[str, Verdict], None]) -> None:
        self._config = config
        self._on_scored = on_scored
        self._jobs: deque[_Job] = deque()
        self._wake_reader, self._wake_writer = Pipe(duplex=False)
        self._is_closed = False
        self._num_false_starts = 0
        self._cpu_s_of_the_dead = 0.0
        self.num_timeouts = 0
        self.num_errors = 0
        self.failure: str | None = None
        """Why no response can be scored any more; None while the pool works."""
        self._workers = [self._start_worker() for _ in range(config.workers)]
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    @property
    def cpu_s(self) -> float:
        """Processor time of all workers so far."""
        return self._cpu_s_of_the_dead + sum(worker.cpu_s for worker in self._workers)

    def submit(self, key: str, text: str, ground_truth: str) -> None:
        """Score a response; the verdict comes through `on_scored` with the same key."""
        self._jobs.append(_Job(key, Task(text=text, ground_truth=ground_truth)))
        self._wake()

    def close(self) -> None:
        """End the workers; what is not scored yet is forgotten."""
        self._is_closed = True
        self._wake()
        self._thread.join()
        for worker in self._workers:
            _end(worker)

    def _wake(self) -> None:
        self._wake_writer.send_bytes(b"!")

    def _run(self) -> None:
        while not self._is_closed and self.failure is None:
            for worker in self._workers:
                self._assign(worker)
            self._hear(self._next_deadline_in_s())
            self._enforce_limits()

    def _assign(self, worker: _Worker) -> None:
        """Give an idle worker the next job. A worker found dead here is heard of in _hear."""
        if not (worker.is_ready and worker.job is None and self._jobs):
            return
        worker.job = self._jobs.popleft()
        worker.deadline_s = time.monotonic() + self._config.timeout_s
        try:
            worker.connection.send_bytes(_ENCODER.encode(worker.job.task))
        except OSError:
            return

    def _next_deadline_in_s(self) -> float | None:
        limited = [w.deadline_s for w in self._workers if w.job is not None or not w.is_ready]
        return max(0.0, min(limited) - time.monotonic()) if limited else None

    def _hear(self, timeout_s: float | None) -> None:
        connections = [worker.connection for worker in self._workers]
        heard = wait([self._wake_reader, *connections], timeout_s)
        if self._wake_reader in heard:
            self._wake_reader.recv_bytes()
        for place, connection in enumerate(connections):
            if connection in heard:
                self._receive(place)

    def _receive(self, place: int) -> None:
        worker = self._workers[place]
        try:
            content = worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._replace_dead(place)
            return
        if content == READY:
            worker.is_ready, self._num_false_starts = True, 0
        elif worker.job is not None:
            self._conclude(worker, _DECODER.decode(content))

    def _conclude(self, worker: _Worker, outcome: Outcome) -> None:
        job, worker.job, worker.cpu_s = worker.job, None, outcome.cpu_s
        assert job is not None, "an outcome belongs to a job"
        if outcome.error is not None:
            self.num_errors += 1
            _log.warning(
                "the scorer raised %s (ground truth %r); the response counts as wrong.",
                outcome.error,
                job.task.ground_truth,
            )
        self._on_scored(job.key, Verdict(is_correct=outcome.is_correct))

    def _enforce_limits(self) -> None:
        now_s = time.monotonic()
        for place, worker in enumerate(self._workers):
            if worker.job is not None and worker.deadline_s <= now_s:
                self._time_out(place, worker.job)
            elif not worker.is_ready and worker.deadline_s <= now_s:
                worker.process.kill()

    def _time_out(self, place: int, job: _Job) -> None:
        self._workers[place].job = None
        self.num_timeouts += 1
        _log.warning(
            "the scorer took more than reward.timeout_s = %g s (%d characters, ground truth %r); "
            "the response counts as wrong.",
            self._config.timeout_s,
            len(job.task.text),
            job.task.ground_truth,
        )
        self._replace(place)
        self._on_scored(job.key, Verdict(is_correct=False, is_timeout=True))

    def _replace_dead(self, place: int) -> None:
        worker, job = self._workers[place], self._workers[place].job
        code = worker.process.wait()
        _log.warning("a scoring worker died (exit code %d); a new one takes its place.", code)
        if not worker.is_ready:
            self._num_false_starts += 1
        if self._num_false_starts >= MAX_TRIES:
            self.failure = (
                f"{MAX_TRIES} scoring workers in a row died before they were ready (last exit code "
                f"{code}); see the lines above. reward.scorer = {self._config.scorer!r}."
            )
            return
        self._replace(place)
        if job is not None:
            self._try_again(job)

    def _try_again(self, job: _Job) -> None:
        job.num_deaths += 1
        if job.num_deaths < MAX_TRIES:
            self._jobs.appendleft(job)
            return
        self.num_errors += 1
        _log.error(
            "scoring one response killed %d workers (ground truth %r); it counts as wrong.",
            MAX_TRIES,
            job.task.ground_truth,
        )
        self._on_scored(job.key, Verdict(is_correct=False))

    def _replace(self, place: int) -> None:
        self._cpu_s_of_the_dead += self._workers[place].cpu_s
        _end(self._workers[place])
        self._workers[place] = self._start_worker()

    def _start_worker(self) -> _Worker:
        """Call from the thread that lives as long as the pool: the kernel ends a worker with it."""
        ours, theirs = Pipe(duplex=True)
        words = [sys.executable, "-m", "dapo_hpc.reward.worker", str(theirs.fileno())]
        words += [str(os.getpid()), self._config.model_dump_json()]
        with blocked_in_children():
            process = subprocess.Popen(
                words, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2
            )
        theirs.close()
        return _Worker(process, ours, time.monotonic() + STARTUP_LIMIT_S)


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.wait()
    worker.connection.close()
