"""A run's config around a tiny model, and one real engine that all tests of this folder share."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_buffer import V0, V1, FakeBuffer
from published import publish_model

from dapo_hpc.config import RunConfig, parse
from dapo_hpc.rollout import contact
from dapo_hpc.rollout import loop as loop_module
from dapo_hpc.rollout.engine import Engine
from dapo_hpc.rollout.loop import ActorLoop

SCORER = "def is_even(text, ground_truth):\n    return len(text) % 2 == 0\n"


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


@pytest.fixture(scope="module")
def shared_engine(tiny_config: Callable[..., RunConfig]) -> Iterator[Engine]:
    """For one file at a time: while it lives the process has vLLM's default process group."""
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


class Actor:
    """An ActorLoop in a thread, with what it raised."""

    def __init__(self, loop: ActorLoop) -> None:
        self.loop = loop
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.loop.run()
        except BaseException as error:  # handed to the test
            self.error = error

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive(), "the actor did not end in time"

    def end(self) -> None:
        """As the test expects it: without an error."""
        self.join()
        assert self.error is None, self.error


@pytest.fixture
def buffer() -> FakeBuffer:
    return FakeBuffer(newest=V0)


@pytest.fixture
def weights(tmp_path: Path, tiny_model: Path, other_model: Path) -> Path:
    """weights/ with v0 (the tiny model) and v1 (the other one)."""
    publish_model(tmp_path / "weights", V0, tiny_model)
    publish_model(tmp_path / "weights", V1, other_model)
    return tmp_path / "weights"


@pytest.fixture
def start(
    buffer: FakeBuffer,
    engine: Engine,
    weights: Path,
    tiny_config: Callable[..., RunConfig],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Actor]]:
    """start(rollout={...}): an actor at work. It is drained when the test ends."""
    from transformers import AutoTokenizer

    (tmp_path / "scorer_under_test.py").write_text(SCORER)
    path = [str(tmp_path), str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    for module in (contact, loop_module):
        monkeypatch.setattr(module, "LONG_POLL_S", 0.5)
    actors: list[Actor] = []

    def make(*, idle_exit_s: float | None = None, **sections: dict[str, Any]) -> Actor:
        reward = {"scorer": "scorer_under_test:is_even", "overlong_punishment": False}
        sections.setdefault("reward", reward)
        loop = ActorLoop(
            name="actor-0",
            config=tiny_config(**sections),
            weights_dir=weights,
            engine=engine,
            tokenizer=AutoTokenizer.from_pretrained(tiny_model),
            buffer=buffer,
            idle_exit_s=idle_exit_s,
        )
        actors.append(Actor(loop))
        return actors[-1]

    yield make
    for actor in actors:
        actor.loop.drain()
        actor.join()


@pytest.fixture
def endless(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No end token ends a response."""
    monkeypatch.setattr(engine, "end_tokens", ())
