"""Times of calls that take turns: device time on a GPU, host time on a CPU."""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

WARM_UP = 3
FLUSH_BYTES = 256 << 20
"""Read before each launch: several times the second-level cache of any card."""
MAX_HIDE_MS = 4.0
"""Longest stretch of flushing that hides a slow host."""
LATENCY_CALLS = 50
SURE_ROUNDS = 3
"""Rounds that are made even when the time is over; without them there is no median."""


@dataclass
class Budget:
    """Seconds that are left; handed down, never renewed."""

    seconds: float
    started_s: float = field(default_factory=time.monotonic)

    def left_s(self) -> float:
        return self.seconds - (time.monotonic() - self.started_s)


@dataclass
class Candidate:
    """A call, what restores its inputs, and what was measured of it."""

    call: Callable[[], Any]
    restore: Callable[[], None] | None = None
    calls: int = 1
    host_ms: float = 0.0
    """Of the host alone, until the call returns: what a launch costs."""
    extra_bytes: int | None = None
    """Peak above what stood in memory before the call."""
    peak_bytes: int | None = None
    times_ms: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        times = sorted(self.times_ms)
        mib = 1 / (1 << 20)
        return {
            "ms": statistics.median(times),
            "p20_ms": quantile(times, 0.2),
            "p80_ms": quantile(times, 0.8),
            "launches": len(times),
            "host_ms": self.host_ms,
            "extra_memory_mib": None if self.extra_bytes is None else self.extra_bytes * mib,
            "peak_memory_mib": None if self.peak_bytes is None else self.peak_bytes * mib,
        }


def quantile(ordered: list[float], fraction: float) -> float:
    """Of sorted values, with linear interpolation."""
    place = fraction * (len(ordered) - 1)
    below = ordered[math.floor(place)]
    return below + (ordered[math.ceil(place)] - below) * (place - math.floor(place))


class CpuClock:
    """Host time."""

    def prepare(self, candidate: Candidate) -> None:
        for _ in range(WARM_UP):
            _restore(candidate)
            candidate.call()

    def launch_ms(self, candidate: Candidate) -> float:
        _restore(candidate)
        started = time.perf_counter()
        candidate.call()
        candidate.host_ms = (time.perf_counter() - started) * 1e3
        return candidate.host_ms / candidate.calls


class GpuClock:
    """Time between two events on the device.

    The launch waits behind a flush of the second-level cache that lasts longer than the host needs
    to enqueue the call, so neither cached inputs nor a slow host are measured. The flush reads: had
    it written, the call would pay for writing the cache's lines back.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.scratch = torch.ones(FLUSH_BYTES // 4, device=device)
        self.sink = torch.empty((), device=device)
        self.flush_ms = 0.05
        self.flush_ms = min(self._flush_ms() for _ in range(5))

    def prepare(self, candidate: Candidate) -> None:
        """Compile, warm up, and measure memory and host time."""
        for _ in range(WARM_UP):
            _restore(candidate)
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            started = time.perf_counter()
            candidate.call()
            candidate.host_ms = (time.perf_counter() - started) * 1e3 / candidate.calls
            torch.cuda.synchronize(self.device)
        candidate.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        candidate.extra_bytes = candidate.peak_bytes - before

    def launch_ms(self, candidate: Candidate) -> float:
        _restore(candidate)
        hide_ms = min(1.5 * candidate.host_ms * candidate.calls, MAX_HIDE_MS)
        for _ in range(max(1, math.ceil(hide_ms / self.flush_ms))):
            self._flush()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        candidate.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / candidate.calls

    def latency_ms(self, candidate: Candidate) -> float:
        """Median from the call in Python to its end on an idle device, by the host's clock."""
        times = []
        for _ in range(LATENCY_CALLS):
            _restore(candidate)
            torch.cuda.synchronize(self.device)
            started = time.perf_counter()
            candidate.call()
            torch.cuda.synchronize(self.device)
            times.append((time.perf_counter() - started) * 1e3)
        return statistics.median(times) / candidate.calls

    def count_kernels(self, candidate: Candidate) -> int:
        """Kernels, copies and fills of one call."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        _restore(candidate)
        torch.cuda.synchronize(self.device)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            candidate.call()
            torch.cuda.synchronize(self.device)
        kernels = sum(event.device_type == DeviceType.CUDA for event in profiler.events())
        return round(kernels / candidate.calls)

    def _flush(self) -> None:
        torch.sum(self.scratch, dim=0, out=self.sink)

    def _flush_ms(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._flush()
        end.record()
        end.synchronize()
        return max(start.elapsed_time(end), 1e-3)


Clock = CpuClock | GpuClock


def clock_of(device: torch.device) -> Clock:
    return GpuClock(device) if device.type == "cuda" else CpuClock()


def take_turns(
    clock: Clock,
    candidates: Mapping[str, Candidate],
    *,
    launches: int,
    seconds: float,
    after_round: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """One launch of each candidate per round, until there are enough or the time is over.

    Returns:
        Who failed on the way, and how; they take no further turns.
    """
    budget, failed = Budget(seconds), dict[str, str]()
    for done in range(launches):
        if done >= SURE_ROUNDS and budget.left_s() < 0:
            break
        for name, candidate in candidates.items():
            if name in failed:
                continue
            try:
                candidate.times_ms.append(clock.launch_ms(candidate))
            except Exception as error:  # a peer may raise anything
                failed[name] = sentence(error)
        after_round()
    return failed


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in a block that runs longer; a compiler deep in C++ finishes first."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def sentence(error: BaseException) -> str:
    """The first line of an error, with its kind. The error itself would keep tensors alive."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no text'}"[:300]


def _restore(candidate: Candidate) -> None:
    if candidate.restore is not None:
        candidate.restore()
