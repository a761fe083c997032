"""Memory of an actor: weights and cache of vLLM, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dapo_hpc.config import RunConfig, load
from dapo_hpc.plan.architecture import Architecture
from dapo_hpc.plan.engine import engine_memory, engine_problems
from dapo_hpc.plan.memory import GIB
from dapo_hpc.plan.parameters import model_elements

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
LARGE = Architecture.read(CONFIGS / "models" / "Qwen2.5-32B")
SMALL = Architecture.read(CONFIGS / "models" / "Qwen2.5-7B")


def config_of(*overrides: str) -> RunConfig:
    return load(CONFIGS / "qwen2.5_32b_dapo.toml", list(overrides))


def test_ranks_of_an_engine_hold_the_model_together() -> None:
    whole = model_elements(LARGE) * 2
    for ranks in (1, 2, 4, 8):
        weights = engine_memory(LARGE, config_of(f"rollout.tensor_parallel={ranks}")).weights
        copies = weights * ranks - whole  # norms, on every rank
        assert 0 <= copies <= (ranks - 1) * 2 * (2 * 64 + 1) * LARGE.hidden


def test_a_key_and_a_value_of_every_layer_for_each_token() -> None:
    """Qwen2.5-32B in bfloat16: 64 layers, 8 heads of 128; a quarter of it on each of 4 GPUs."""
    memory = engine_memory(LARGE, config_of())
    assert memory.cache == memory.budget - memory.weights - memory.work
    assert memory.cache_tokens == memory.cache // (2 * 64 * 2 * 128 * 2)
    assert memory.full_sequences == memory.cache_tokens // 22528
    assert memory.budget == int(0.8 * 80 * GIB)


def test_more_gpus_than_key_value_heads_hold_copies() -> None:
    four, eight = (
        engine_memory(
            replace(SMALL, heads=32, kv_heads=4), config_of(f"rollout.tensor_parallel={n}")
        )
        for n in (4, 8)
    )
    assert four.cache // four.cache_tokens == eight.cache // eight.cache_tokens
    assert eight.weights > four.weights / 2


def test_a_cache_too_small_for_one_response_is_refused_with_the_cheapest_change() -> None:
    config = config_of("rollout.tensor_parallel=1")
    (problem,) = engine_problems(LARGE, config)
    assert "less than one response of full length (22528 with its prompt)" in problem
    assert "rollout.gpu_memory_frac = 0.8 allows 64.0, weights take 61.0" in problem
    assert "Cheapest change: rollout.gpu_memory_frac = 0.9." not in problem
    assert "Cheapest change: rollout.tensor_parallel = 2." in problem
    changed = config_of("rollout.tensor_parallel=2")
    assert engine_problems(LARGE, changed) == []


def test_a_larger_share_of_the_gpu_is_cheaper_than_more_gpus() -> None:
    config = config_of("rollout.gpu_memory_frac=0.25")
    (problem,) = engine_problems(LARGE, config)
    assert "Cheapest change: rollout.gpu_memory_frac = 0.9." in problem


def test_nothing_is_proposed_that_would_not_fit() -> None:
    config = config_of("hardware.gpu_memory_gib=6", "rollout.max_batched_tokens=1024")
    (problem,) = engine_problems(LARGE, config)
    assert problem.endswith("take larger GPUs, or shorter responses.")


@pytest.mark.parametrize(
    ("size", "overrides", "words"),
    [
        (SMALL, ["rollout.tensor_parallel=3"], "rollout.tensor_parallel = 3 does not fit the 28"),
        (SMALL, ["rollout.tensor_parallel=8"], "rollout.tensor_parallel = 8 does not fit the 28"),
        (
            replace(SMALL, max_positions=4096),
            ["rollout.tensor_parallel=1"],
            "max_position_embeddings = 4096; vLLM refuses longer sequences",
        ),
    ],
)
def test_what_vllm_would_refuse(size: Architecture, overrides: Any, words: str) -> None:
    (problem,) = engine_problems(size, config_of(*overrides))
    assert words in problem


def test_on_processors_the_cache_is_what_the_config_gives() -> None:
    config = config_of("hardware.gpus_per_node=0", "rollout.cpu_cache_gib=1")
    memory = engine_memory(LARGE, config)
    assert (memory.cache, memory.work) == (GIB, 0)
    (problem,) = engine_problems(LARGE, config)
    assert problem.startswith("rollout.cpu_cache_gib = 1 holds ")
