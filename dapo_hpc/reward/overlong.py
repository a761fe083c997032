"""From an outcome and a length to the reward."""

from __future__ import annotations

from dapo_hpc.config import RewardSection


def overlong_punishment(
    num_tokens: int, *, max_response_tokens: int, overlong_cache_tokens: int
) -> float:
    """Soft punishment of long responses, in [-1, 0].

    With L = max_response_tokens and C = overlong_cache_tokens: 0 up to L - C, then falling in a
    line to -1 at L, and -1 beyond.

    Source: DAPO, arXiv 2503.14476, Eq. 13.
    """
    excess = num_tokens - (max_response_tokens - overlong_cache_tokens)
    return -min(max(excess / overlong_cache_tokens, 0.0), 1.0)


def shaped_reward(
    is_correct: bool, num_tokens: int, config: RewardSection, *, max_response_tokens: int
) -> float:
    """+1 or -1 by outcome (DAPO, Eq. 7), plus the overlong punishment if it is switched on."""
    reward = 1.0 if is_correct else -1.0
    if not config.overlong_punishment:
        return reward
    return reward + overlong_punishment(
        num_tokens,
        max_response_tokens=max_response_tokens,
        overlong_cache_tokens=config.overlong_cache_tokens,
    )
