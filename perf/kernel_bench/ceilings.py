"""What this machine can do at most, measured beside the figures that are divided by it."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .clock import Candidate, Clock, CpuClock
from .task import Work

LAUNCHES = 11
SETTLE_S = 1.0
"""Of matrix products before the first measurement, so that the clocks have settled."""


@dataclass(frozen=True)
class Ceilings:
    copy_bytes_per_s: float
    """A copy of one large tensor, bytes read plus bytes written."""
    matmul_flops_per_s: float
    """A square bfloat16 matrix product of random data."""

    def floor_ms(self, work: Work) -> float:
        """The longer of moving the bytes and doing the matrix products."""
        return 1e3 * max(work.bytes / self.copy_bytes_per_s, work.flops / self.matmul_flops_per_s)

    def bound(self, work: Work) -> str:
        moving = work.bytes / self.copy_bytes_per_s
        return "copy" if moving >= work.flops / self.matmul_flops_per_s else "matmul"

    def figures(self) -> dict[str, Any]:
        return asdict(self)


class CeilingProbe:
    """Holds its tensors, so that a measurement between two tasks takes milliseconds."""

    def __init__(self, device: torch.device, clock: Clock) -> None:
        is_small = isinstance(clock, CpuClock)
        self.clock = clock
        self.size = 512 if is_small else 8192
        self.num_bytes = (16 << 20) if is_small else (2 << 30)
        self.source = torch.randint(0, 255, (self.num_bytes,), dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)
        shape = (self.size, self.size)
        self.left, self.right = (torch.randn(shape, device=device).bfloat16() for _ in range(2))
        self.product = torch.empty_like(self.left)
        if not is_small:
            self._settle()

    def measure(self) -> Ceilings:
        copy_ms = self._median_ms(lambda: self.target.copy_(self.source))
        matmul_ms = self._median_ms(self._multiply)
        return Ceilings(2 * self.num_bytes / copy_ms * 1e3, 2 * self.size**3 / matmul_ms * 1e3)

    def _multiply(self) -> torch.Tensor:
        return torch.mm(self.left, self.right, out=self.product)

    def _median_ms(self, call: Any) -> float:
        candidate = Candidate(call)
        self.clock.prepare(candidate)
        return statistics.median(self.clock.launch_ms(candidate) for _ in range(LAUNCHES))

    def _settle(self) -> None:
        until = time.monotonic() + SETTLE_S
        while time.monotonic() < until:
            self._multiply()
            torch.cuda.synchronize(self.left.device)
