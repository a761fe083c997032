"""Which groups make a batch, how many prompts to keep in flight, what is too old."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from dapo_hpc.buffer.forecast import Expected, Outlook, Tally, new_prompts
from dapo_hpc.buffer.group import Group
from dapo_hpc.buffer.state import State
from dapo_hpc.config import RunConfig

Closing = Literal["dispatch_order", "first_finished"]


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
    closing: Closing = "dispatch_order"

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
            closing=config.buffer.closing,
        )


def oldest_step(settings: BufferSettings, step: int) -> int:
    """The oldest policy step whose tokens the batch of `step` may hold."""
    return step - 1 - settings.max_staleness


def outlook(state: State, settings: BufferSettings) -> Outlook:
    """What the groups up to the last cut, and those finished since, say about coming ones."""
    return Outlook.of(settings.group_size, state.history, state.window.by_correct)


def ready_capacity(state: State, settings: BufferSettings) -> int:
    """Informative groups that may lie ready now: (max_staleness + 1) * N less the batches ahead.

    Zero after the batch of a step closed, until its weights are published, when max_staleness is 0;
    zero or less while a restarted learner works through batches it already took.
    """
    if state.newest is None:
        return 0
    last_step = min(state.newest.step + 1 + settings.max_staleness, settings.total_steps)
    return (last_step - state.current_step + 1) * settings.prompts_per_step


def num_new_prompts(
    settings: BufferSettings, tally: Tally, prospects: Outlook, *, num_missing: int, num_room: int
) -> int:
    """How many prompts to begin now, beside the open groups.

    Enough for the batch being filled, which lacks `num_missing` groups, with a reserve; and, when
    sampling may run ahead, enough for the room that is left, `num_room` groups, on average.
    """
    if num_room <= 0:
        return 0
    if not settings.dynamic_sampling:
        return max(0, num_room - tally.num_groups)
    expected = Expected.of(tally, prospects)
    return max(
        new_prompts(num_missing, expected, prospects),
        new_prompts(num_room, expected, prospects, safety=0.0),
    )


def closable_batch(
    live: Iterable[Group], num_groups: int, closing: Closing = "dispatch_order"
) -> list[Group] | None:
    """The groups of a batch, in dispatch order, or None while it cannot close.

    'dispatch_order': the first `num_groups`, once each of them is ready. A group that is still open
    holds back the ones dispatched after it; uniform and dropped groups have left `live` and hold
    back nobody. 'first_finished': the first `num_groups` to be ready, which are the short ones.
    """
    if closing == "first_finished":
        live = (group for group in live if group.state == "ready")
    batch = []
    for group in itertools.islice(live, num_groups):
        if group.state != "ready":
            return None
        batch.append(group)
    return batch if len(batch) == num_groups else None


@dataclass(frozen=True, slots=True)
class Share:
    """How many open groups each actor may hold, so that all have equally many."""

    level: float
    """Everybody may hold so many; infinite when there is more to do than fits."""
    num_extra: int
    """Actors that may hold one more."""


def fair_share(total: int, capacities: Sequence[int]) -> Share:
    """Lay `total` groups on actors of these capacities, level by level, like water in a vessel.

    The level L is the largest with sum_i min(capacity_i, L) <= total; what is left of the total
    goes to as many actors, one group each.
    """
    ordered = sorted(capacities)
    for index, capacity in enumerate(ordered):
        num_actors = len(ordered) - index
        if capacity * num_actors > total:
            return Share(*divmod(total, num_actors))
        total -= capacity
    return Share(math.inf, 0)
