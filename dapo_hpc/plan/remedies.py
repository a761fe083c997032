"""The cheapest change of the learner's layout that makes it fit its GPUs."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from dapo_hpc.config import LearnerSection, RunConfig
from dapo_hpc.plan.architecture import Architecture
from dapo_hpc.plan.layout import layout_problems
from dapo_hpc.plan.memory import GIB, RankMemory, learner_memory

SHARD_OPTIMIZER = 1
"""The same bytes travel: a reduce-scatter and an all-gather instead of an all-reduce."""
SPLIT_ROWS = 1
"""Sequence parallelism: again the same bytes in two halves."""
HALVE_MICRO_BATCH = 2
"""More passes, each with fewer rows for the same weights."""
RECOMPUTE_ATTENTION = 3
RECOMPUTE_LAYERS = 10
"""One more forward pass where there are a forward and a backward pass: a third more compute."""
DOUBLE_TENSOR = 14
"""Twice the traffic inside a node for each layer, and narrower matrices."""
DOUBLE_PIPELINE = 16
"""Stages wait for each other at both ends of a mini-batch."""
MORE_GPUS = 100
"""Twice as many: another replica for each, or, beside the costs above, more GPUs for each."""
MOST_GPUS = 8
"""Times the GPUs of the config; more are not proposed."""
MAX_TRIED = 4000
"""Layouts looked at before the search gives up."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """A layout that fits."""

    changes: dict[str, Any]
    """Key of the config -> its new value."""
    peak_bytes: int
    gpus: int

    def text(self) -> str:
        words = [f"{key} = {_toml(value)}" for key, value in self.changes.items()]
        return f"{', '.join(words)} ({self.peak_bytes / GIB:.1f} GiB on {self.gpus} GPUs)"


def peak(memories: list[RankMemory]) -> int:
    """Of the stage that needs most."""
    return max(memory.total for memory in memories)


def cheapest(architecture: Architecture, config: RunConfig) -> Remedy | None:
    """The change, or the set of changes, of least cost that fits hardware.gpu_memory_gib.

    Costs are the constants above: their order says what one would rather give up, and sets of
    changes cost their sum. None: no layout that was tried fits.
    """
    limit = config.hardware.gpu_memory_gib * GIB
    order = count()
    queue: list[tuple[int, int, LearnerSection]] = [(0, next(order), config.learner)]
    seen: set[LearnerSection] = set()
    while queue and len(seen) < MAX_TRIED:
        cost, _, learner = heapq.heappop(queue)
        if learner in seen:
            continue
        seen.add(learner)
        tried = config.model_copy(update={"learner": learner})
        needed = peak(learner_memory(architecture, tried))
        if needed <= limit:
            return Remedy(_changed(config.learner, learner), needed, num_gpus(learner))
        for extra, change in _steps(tried):
            changed = learner.model_copy(update=change)
            is_payable = num_gpus(changed) <= MOST_GPUS * num_gpus(config.learner)
            if is_payable and not layout_problems(architecture, changed):
                heapq.heappush(queue, (cost + extra, next(order), changed))
    return None


def num_gpus(learner: LearnerSection) -> int:
    """Of the learner: one for each rank."""
    model = learner.tensor_parallel * learner.pipeline_parallel * learner.context_parallel
    return model * learner.data_parallel


def _steps(config: RunConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    """Cost and change of every single step from a layout."""
    learner = config.learner
    if not learner.distributed_optimizer and learner.data_parallel * learner.context_parallel > 1:
        yield SHARD_OPTIMIZER, {"distributed_optimizer": True}
    if not learner.sequence_parallel and learner.tensor_parallel > 1:
        yield SPLIT_ROWS, {"sequence_parallel": True}
    if learner.micro_batch_tokens > config.max_sequence_tokens:
        fewer = max(config.max_sequence_tokens, learner.micro_batch_tokens // 2)
        yield HALVE_MICRO_BATCH, {"micro_batch_tokens": fewer}
    if learner.recompute == "none":
        yield RECOMPUTE_ATTENTION, {"recompute": "selective"}
    if learner.recompute != "full":
        yield RECOMPUTE_LAYERS, {"recompute": "full"}
    if 2 * learner.tensor_parallel <= config.hardware.gpus_per_node:
        yield from _doubled(learner, "tensor_parallel", DOUBLE_TENSOR)
    yield from _doubled(learner, "pipeline_parallel", DOUBLE_PIPELINE)
    yield MORE_GPUS, {"data_parallel": 2 * learner.data_parallel}


def _doubled(learner: LearnerSection, axis: str, cost: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """On the same GPUs if there are two replicas to merge, else on twice as many."""
    change = {axis: 2 * getattr(learner, axis)}
    if learner.data_parallel % 2 == 0:
        yield cost, {**change, "data_parallel": learner.data_parallel // 2}
    yield cost + MORE_GPUS, change


def _changed(before: LearnerSection, after: LearnerSection) -> dict[str, Any]:
    old, new = before.model_dump(), after.model_dump()
    return {f"learner.{name}": new[name] for name in new if new[name] != old[name]}


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
