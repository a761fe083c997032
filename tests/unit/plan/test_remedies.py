"""The search for the cheapest change, against a search through everything."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from dapo_hpc.config import RunConfig, load
from dapo_hpc.plan import remedies
from dapo_hpc.plan.architecture import Architecture
from dapo_hpc.plan.layout import layout_problems
from dapo_hpc.plan.memory import GIB, learner_memory
from dapo_hpc.plan.remedies import cheapest, num_gpus, peak

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SIZE = Architecture.read(CONFIGS / "models" / "Qwen2.5-7B")
PLAIN = [
    "learner.recompute=none",
    "learner.distributed_optimizer=false",
    "learner.sequence_parallel=false",
    "learner.tensor_parallel=1",
    "learner.data_parallel=8",
    "rollout.prompts_per_step=64",
    "rollout.max_response_tokens=6144",
]
"""Qwen2.5-7B on 8 GPUs with every saving off, at 8,192 tokens."""


def config_of(*overrides: str) -> RunConfig:
    return load(CONFIGS / "qwen2.5_7b_dapo.toml", [*PLAIN, *overrides])


def fits(config: RunConfig, changes: dict[str, Any]) -> bool:
    update = {key.removeprefix("learner."): value for key, value in changes.items()}
    changed = config.model_copy(update={"learner": config.learner.model_copy(update=update)})
    return peak(learner_memory(SIZE, changed)) <= config.hardware.gpu_memory_gib * GIB


def cost(before: RunConfig, layout: dict[str, Any]) -> int | None:
    """Of a layout on as many GPUs, by the constants of remedies.py alone; None: not possible."""
    learner = before.learner.model_copy(update=layout)
    if layout_problems(SIZE, learner) or num_gpus(learner) != num_gpus(before.learner):
        return None
    if learner.sequence_parallel and learner.tensor_parallel == 1:
        return None
    if learner.distributed_optimizer and learner.data_parallel == 1:
        return None
    total = remedies.SHARD_OPTIMIZER * learner.distributed_optimizer
    total += remedies.SPLIT_ROWS * learner.sequence_parallel
    halvings = {22528: 0, 11264: 1, 8192: 2}[learner.micro_batch_tokens]
    total += remedies.HALVE_MICRO_BATCH * halvings
    recompute = {
        "none": 0,
        "selective": remedies.RECOMPUTE_ATTENTION,
        "full": remedies.RECOMPUTE_LAYERS,
    }
    total += recompute[learner.recompute]
    total += remedies.DOUBLE_TENSOR * (learner.tensor_parallel.bit_length() - 1)
    return total + remedies.DOUBLE_PIPELINE * (learner.pipeline_parallel.bit_length() - 1)


def cheapest_of_all(config: RunConfig) -> int | None:
    """Least cost of any layout on the same GPUs that fits."""
    axes = {
        "distributed_optimizer": (False, True),
        "sequence_parallel": (False, True),
        "micro_batch_tokens": (22528, 11264, 8192),
        "recompute": ("none", "selective", "full"),
        "tensor_parallel": (1, 2, 4),
        "pipeline_parallel": (1, 2, 4),
        "data_parallel": (1, 2, 4, 8),
    }
    layouts = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    costs = [cost(config, layout) for layout in layouts if fits(config, layout)]
    return min((c for c in costs if c is not None), default=None)


@pytest.mark.parametrize("gib", [20, 30, 40, 60, 80, 140, 200, 400])
def test_nothing_cheaper_fits(gib: int) -> None:
    config = config_of(f"hardware.gpu_memory_gib={gib}")
    found = cheapest(SIZE, config)
    least = cheapest_of_all(config)
    if least is None:
        assert found is None or found.gpus > num_gpus(config.learner)
        return
    assert found is not None
    assert fits(config, found.changes)
    layout = {key.removeprefix("learner."): value for key, value in found.changes.items()}
    assert cost(config, layout) == least


def test_what_fits_needs_no_change() -> None:
    found = cheapest(SIZE, config_of("hardware.gpu_memory_gib=400"))
    assert found is not None
    assert found.changes == {}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # What costs no traffic and no compute comes first.
        (["hardware.gpu_memory_gib=220"], {"learner.distributed_optimizer": True}),
        (
            ["learner.distributed_optimizer=true", "hardware.gpu_memory_gib=140"],
            {"learner.micro_batch_tokens": 11264},
        ),
        # Then a third more compute, before anything that needs the network.
        (
            ["learner.distributed_optimizer=true", "hardware.gpu_memory_gib=70"],
            {"learner.recompute": "full"},
        ),
    ],
)
def test_order_of_preference(overrides: list[str], expected: dict[str, Any]) -> None:
    found = cheapest(SIZE, config_of(*overrides))
    assert found is not None
    assert found.changes == expected


def test_more_gpus_are_the_last_resort_and_bounded() -> None:
    found = cheapest(SIZE, config_of("learner.data_parallel=1", "hardware.gpu_memory_gib=40"))
    assert found is not None
    assert 1 < found.gpus <= remedies.MOST_GPUS
    assert cheapest(SIZE, config_of("hardware.gpu_memory_gib=4")) is None


def test_changes_read_as_toml() -> None:
    remedy = remedies.Remedy(
        {"learner.recompute": "full", "learner.sequence_parallel": True, "learner.x": 2}, GIB, 8
    )
    assert remedy.text() == (
        'learner.recompute = "full", learner.sequence_parallel = true, learner.x = 2 (1.0 GiB on '
        "8 GPUs)"
    )
