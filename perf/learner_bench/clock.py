"""Laps of a step, by the host's clock, with the device idle at each."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import torch

PHASES = ("score", "update", "optimizer")
MIB = 1 << 20


class Laps:
    """Seconds from the start of a step to the end of each of its phases.

    Those of the processor count all threads of this process, and not what others take from it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ends_s: dict[str, float] = {}
        self.ends_cpu_s: dict[str, float] = {}
        self._wait()
        self._cpu_s = time.process_time()
        self._started_s = time.perf_counter()

    def end(self, phase: str) -> None:
        self._wait()
        self.ends_s[phase] = time.perf_counter() - self._started_s
        self.ends_cpu_s[phase] = time.process_time() - self._cpu_s

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_mib(device: torch.device) -> float:
    """Of the allocator on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def held_mib(device: torch.device) -> float:
    """What stands now, as in `peak_mib`."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MIB
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB
