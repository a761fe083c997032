"""Which groups make a batch, how many prompts to keep in flight, what is too old."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dapo_hpc.buffer.group import Group
from dapo_hpc.buffer.state import State
from dapo_hpc.config import RunConfig

PRIOR_RATE = 0.5
"""Acceptance rate assumed before anything is measured."""
PRIOR_GROUPS = 4
"""Weight of that assumption, in groups."""
DISPATCH_MARGIN = 1.1
"""Prompts in flight above the expected need. Too few cost another round of sampling while the
engines idle; too many cost surplus tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferSettings:
    """The knobs the core decides by; see dapo_hpc.config for units and sources."""

    total_steps: int
    prompts_per_step: int
    group_size: int
    dynamic_sampling: bool
    max_staleness: int
    lease_s: float
    max_attempts: int
    on_exhausted: Literal["next_pass", "smaller_batch", "wait"]
    eval_samples: int

    @classmethod
    def from_config(cls, config: RunConfig) -> BufferSettings:
        return cls(
            total_steps=config.run.total_steps,
            prompts_per_step=config.rollout.prompts_per_step,
            group_size=config.rollout.group_size,
            dynamic_sampling=config.buffer.dynamic_sampling,
            max_staleness=config.buffer.max_staleness,
            lease_s=config.buffer.lease_s,
            max_attempts=config.buffer.max_attempts,
            on_exhausted=config.prompts.on_exhausted,
            eval_samples=config.eval.samples,
        )


def oldest_step(settings: BufferSettings, step: int) -> int:
    """The oldest policy step whose tokens the batch of `step` may hold."""
    return step - 1 - settings.max_staleness


def acceptance_rate(state: State, settings: BufferSettings) -> float:
    """Expected share of informative groups among those that finish, in (0, 1]."""
    if not settings.dynamic_sampling:
        return 1.0
    known = state.recent_informative + PRIOR_RATE * PRIOR_GROUPS
    return known / (state.recent_groups + PRIOR_GROUPS)


def ready_capacity(state: State, settings: BufferSettings) -> int:
    """Informative groups that may lie ready now: (max_staleness + 1) * N less the batches ahead.

    Zero after the batch of a step closed, until its weights are published, when max_staleness is 0;
    zero or less while a restarted learner works through batches it already took.
    """
    if state.newest is None:
        return 0
    last_step = min(state.newest.step + 1 + settings.max_staleness, settings.total_steps)
    return (last_step - state.current_step + 1) * settings.prompts_per_step


def prompts_in_flight(state: State, settings: BufferSettings, num_ready: int) -> int:
    """How many groups should be open: what is still needed over the acceptance rate, and a bit."""
    needed = ready_capacity(state, settings) - num_ready
    if needed <= 0:
        return 0
    margin = DISPATCH_MARGIN if settings.dynamic_sampling else 1.0
    return math.ceil(needed / acceptance_rate(state, settings) * margin - 1e-9)


def closable_batch(live: Iterable[Group], num_groups: int) -> list[Group] | None:
    """The first `num_groups` groups in dispatch order, once each of them is ready.

    Not the first to finish: those are the short ones. A group that is still open holds back the
    ones dispatched after it; uniform and dropped groups have left `live` and hold back nobody.
    """
    first = list(itertools.islice(live, num_groups))
    if len(first) < num_groups or any(group.state != "ready" for group in first):
        return None
    return first


def fair_share(total: int, num_actors: int) -> int:
    """Open groups one actor may hold when `total` are wanted."""
    return math.ceil(total / max(num_actors, 1))
