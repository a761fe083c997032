"""What the prompts of the simulation are like: pass rates, lengths, outcomes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dapo_hpc.prompts.order import PromptOrder

PASS_RATE = (0.6, 0.9)
"""Parameters of the Beta distribution of a prompt's pass rate: many too hard, some too easy."""
MEDIAN_TOKENS = 3500.0
"""Of a response to a prompt of pass rate 0.5."""
LENGTH_SLOPE = 0.8
"""Harder prompts are longer: log-length falls by this much from pass rate 0 to 1."""
LENGTH_SIGMA = 0.6
"""Standard deviation of log-length within a prompt."""
MAX_TOKENS = 20_480
NUM_ROWS = 1_000_000


@dataclass(frozen=True, slots=True)
class Draw:
    """One sampling of a prompt: what its G responses turn out to be."""

    lengths: list[int]
    """Tokens."""
    is_correct: list[bool]

    @property
    def is_informative(self) -> bool:
        return any(self.is_correct) and not all(self.is_correct)


@dataclass(frozen=True)
class Workload:
    """Every policy of one seed gets the same prompts in the same order, with the same outcomes."""

    seed: int
    group_size: int = 16

    @cached_property
    def order(self) -> PromptOrder:
        return PromptOrder(NUM_ROWS, self.seed)

    def draw(self, row: int, attempt: int = 0) -> Draw:
        """The responses of a prompt; another attempt samples anew at the same pass rate."""
        pass_rate = np.random.default_rng([self.seed, row]).beta(*PASS_RATE)
        rng = np.random.default_rng([self.seed, row, 1 + attempt])
        log_mean = np.log(MEDIAN_TOKENS) + LENGTH_SLOPE * (0.5 - pass_rate)
        noise = LENGTH_SIGMA * rng.standard_normal(self.group_size)
        lengths = np.minimum(np.exp(log_mean + noise), MAX_TOKENS).astype(int)
        return Draw(
            lengths=[max(1, n) for n in lengths.tolist()],
            is_correct=(rng.random(self.group_size) < pass_rate).tolist(),
        )
