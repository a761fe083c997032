"""The learning rate of a rollout step: a warm-up, then constant or falling to the last step."""

from __future__ import annotations

import math

from dapo_hpc.config import OptimizerSection


def learning_rate(optimizer: OptimizerSection, step: int, *, total_steps: int) -> float:
    """Of rollout step `step` (from 1), all its updates alike.

    lr * min(1, (step - 1 + first) / warmup_steps), where first is optimizer.first_warmup_step; from
    the step at which that reaches lr it falls, unless optimizer.schedule is "constant", so that
    step `total_steps` trains at lr * min_lr_frac.

    Source: DAPO, section 4.1 (linear warm-up, then constant).
    """
    warmup, first = optimizer.warmup_steps, optimizer.first_warmup_step
    done, last = step - 1 + first, total_steps - 1 + first
    if done < warmup:
        return optimizer.lr * done / warmup
    highest = max(warmup, first)  # without a warm-up, step 1
    past = (done - highest) / max(last - highest, 1)
    return optimizer.lr * _falling(optimizer, min(past, 1.0))


def _falling(optimizer: OptimizerSection, past: float) -> float:
    """Share of lr after `past` (0 to 1) of the way from the warm-up's end to the last step."""
    lowest = optimizer.min_lr_frac
    if optimizer.schedule == "cosine":
        return lowest + (1.0 - lowest) * (1.0 + math.cos(math.pi * past)) / 2.0
    if optimizer.schedule == "linear":
        return lowest + (1.0 - lowest) * (1.0 - past)
    return 1.0
