"""Group-relative advantages."""

from __future__ import annotations

import numpy as np

from dapo_hpc.config import AdvantageSection


def group_advantages(rewards: np.ndarray, config: AdvantageSection) -> np.ndarray:
    """(R - mean) / (std + eps) of one group, or R - mean; exactly 0 when all rewards are equal.

    Source: DAPO, arXiv 2503.14476, Eq. 9, which names neither ddof nor eps: they are settings.

    Args:
        rewards: [G] shaped rewards of the responses of one prompt.
        config: scale, ddof and eps.

    Returns:
        [G] float64; constant over the tokens of a response.

    Raises:
        ValueError: a reward is not finite, or rewards is not one-dimensional.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 1 or not np.isfinite(rewards).all():
        raise ValueError(f"rewards of a group must be finite numbers [G], got {rewards.tolist()}.")
    # By equality, not by std: the rounded mean of equal rewards can differ from them.
    if (rewards == rewards[:1]).all():
        return np.zeros_like(rewards)
    centered: np.ndarray = rewards - rewards.mean()
    if config.scale == "std":
        centered /= rewards.std(ddof=config.ddof) + config.eps
    return centered
