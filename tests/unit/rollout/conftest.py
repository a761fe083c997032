"""A run's config around a tiny model, and one real engine that all tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dapo_hpc.config import RunConfig, parse
from dapo_hpc.rollout.engine import Engine


@pytest.fixture(scope="session")
def tiny_config(tiny_model: Path) -> Callable[..., RunConfig]:
    """tiny_config(rollout={...}, buffer={...}): float32, no evaluation, small limits."""

    def make(**sections: dict[str, Any]) -> RunConfig:
        table: dict[str, dict[str, Any]] = {
            "run": {"name": "test", "total_steps": 1},
            "model": {"path": str(tiny_model), "dtype": "float32"},
            "prompts": {"train": "unused.parquet", "max_tokens": 200, "chat_template": "none"},
            "eval": {"every": 0},
            "rollout": {
                "max_response_tokens": 100,
                "max_sequences": 64,
                "group_size": 4,
                "prompts_per_step": 16,
            },
            "reward": {"overlong_punishment": False},
        }
        for name, values in sections.items():
            table[name] = {**table.get(name, {}), **values}
        return parse(table)

    return make


@pytest.fixture(scope="session")
def shared_engine(tiny_config: Callable[..., RunConfig]) -> Iterator[Engine]:
    pytest.importorskip("vllm", reason="needs vLLM")
    engine = Engine(tiny_config(), seed=3)
    yield engine
    engine.close()


@pytest.fixture
def engine(shared_engine: Engine, tiny_model: Path) -> Iterator[Engine]:
    """Idle, with the tiny model's own weights."""
    shared_engine.load(tiny_model)
    yield shared_engine
    shared_engine.abort(list(shared_engine._running))
    shared_engine.step()


@pytest.fixture(scope="session")
def other_model(make_tiny_model: Callable[..., Path]) -> Path:
    """The same shapes, other weights."""
    return make_tiny_model(seed=1)
