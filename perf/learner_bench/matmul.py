"""The ceiling: a square matrix product of drawn numbers, in turns with the steps."""

from __future__ import annotations

import statistics
import time

import torch

from .clock import Laps
from .task import Job

SIZES = {"cpu": 1024, "cuda": 8192}
LAUNCHES = 7


class Matmul:
    """A team that multiplies instead of training."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self.device = torch.device(job.device, 0) if job.device == "cuda" else torch.device("cpu")
        self.size = SIZES[job.device]
        shape, dtype = (self.size, self.size), getattr(torch, job.dtype)
        self.left, self.right = (torch.randn(shape, device=self.device).to(dtype) for _ in range(2))
        self.product = torch.empty_like(self.left)

    def step(self) -> Laps:
        laps = Laps(self.device)
        times_s = [self._product_s() for _ in range(LAUNCHES)]
        self.flops_per_s = 2 * self.size**3 / statistics.median(times_s)
        laps.end("optimizer")
        return laps

    def check(self) -> dict[str, float]:
        """Of the last turn."""
        return {"flops_per_s": self.flops_per_s}

    def _product_s(self) -> float:
        started_s = time.perf_counter()
        torch.mm(self.left, self.right, out=self.product)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started_s
