"""The learner's life against a stand-in for the buffer: resume, evaluations, commits, the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
import transformers
from safetensors.torch import load_file

from dapo_hpc.config import RunConfig
from dapo_hpc.learner import train as train_module
from dapo_hpc.learner.parallel import Processes
from dapo_hpc.learner.session import open_session
from dapo_hpc.learner.train import train
from dapo_hpc.observe import metrics
from dapo_hpc.records import PolicyVersion
from dapo_hpc.run_dir import RunDir
from dapo_hpc.weights.manifest import verify
from tests.learner_parts import FakeBuffer, make_config, make_model


def prepare(root: Path, **sections: dict[str, Any]) -> tuple[RunDir, RunConfig]:
    make_model(root / "model", "qwen3", tied=True)
    config = make_config(root / "model", root, **sections)
    config.run_dir.mkdir(parents=True)
    return RunDir(config.run_dir), config


def run_once(run: RunDir, config: RunConfig, here: Processes, buffer: FakeBuffer) -> None:
    train(open_session(run, config, here, buffer))


EVALUATED = {"eval": {"every": 2}, "prompts": {"eval": "unused.parquet"}}


def test_a_run_from_start_to_end(here: Processes, tmp_path: Path) -> None:
    run, config = prepare(tmp_path, **EVALUATED)
    buffer = FakeBuffer()
    run_once(run, config, here, buffer)
    assert buffer.published == [
        (PolicyVersion(step=step, lineage=1), step in (0, 2, 3)) for step in range(4)
    ]
    assert buffer.commits == [1, 1, 2]  # the oldest of the two retained checkpoints
    assert buffer.is_finished
    assert [row["step"] for row in metrics.read(run.metrics, "step")] == [1, 2, 3]
    evaluations = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [r["step"] for r in evaluations if r["kind"] == "eval"] == [0, 2, 3], "once each"
    assert sorted(path.name for path in run.eval.iterdir()) == [
        f"v00000{step}-l001.json" for step in (0, 2, 3)
    ]
    assert sorted(p.name for p in run.weights.glob("v*")) == [
        f"v00000{step}-l001" for step in (1, 2, 3)
    ]


def test_the_model_at_the_end_is_the_one_that_was_published(
    here: Processes, tmp_path: Path
) -> None:
    run, config = prepare(tmp_path)
    run_once(run, config, here, FakeBuffer())
    manifest = verify(run.weights / "v000003-l001")
    exported = load_file(run.model / "model.safetensors")
    published = load_file(run.weights / "v000003-l001" / "model.safetensors")
    assert exported.keys() == published.keys()
    assert all(torch.equal(exported[name], published[name]) for name in exported)

    model = transformers.AutoModelForCausalLM.from_pretrained(run.model).float()
    start = transformers.AutoModelForCausalLM.from_pretrained(config.model.path).float()
    for probe in manifest.probes:
        expected = probe_logprobs(model, probe.token_ids)
        assert torch.tensor(probe.logprobs).sub(expected).abs().max() < 1e-4
        # Negative control: the model before training does not pass.
        assert (
            torch.tensor(probe.logprobs).sub(probe_logprobs(start, probe.token_ids)).abs().max()
            > 1e-3
        )


def probe_logprobs(model: Any, token_ids: list[int]) -> torch.Tensor:
    ids = torch.tensor(token_ids)
    with torch.no_grad():
        distribution = torch.log_softmax(model(ids[None]).logits[0], -1)
    return distribution[:-1].gather(1, ids[1:, None])[:, 0]


class Crash(Exception):
    pass


def test_a_crashed_run_ends_with_the_same_bits(
    here: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: dict[str, Any] = {"run": {"total_steps": 5}, "learner": {"checkpoint_every": 2}}
    straight, config = prepare(tmp_path / "straight", **sections, **EVALUATED)
    run_once(straight, config, here, FakeBuffer())

    broken, config = prepare(tmp_path / "broken", **sections, **EVALUATED)
    buffer = FakeBuffer()
    real = train_module.rollout_step

    def crashes_at_4(session: Any, step: int) -> dict[str, float]:
        if step == 4:
            raise Crash
        return real(session, step)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "rollout_step", crashes_at_4)
        with pytest.raises(Crash):
            run_once(broken, config, here, buffer)
    run_once(broken, config, here, buffer)

    first = load_file(straight.model / "model.safetensors")
    second = load_file(broken.model / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    steps = [version.step for version, _ in buffer.published]
    assert steps == [0, 1, 2, 3, 2, 3, 4, 5], "it resumed after step 2"
    assert buffer.published[4] == (PolicyVersion(step=2, lineage=2), False), "evaluated before"
    for mine, theirs in zip(
        metrics.read(straight.metrics, "step"), metrics.read(broken.metrics, "step"), strict=True
    ):
        assert mine["learner/loss"] == theirs["learner/loss"]


def test_a_run_that_is_complete_only_hands_over(here: Processes, tmp_path: Path) -> None:
    run, config = prepare(tmp_path)
    run_once(run, config, here, FakeBuffer())
    before = run.metrics.read_text()
    again = FakeBuffer()
    run_once(run, config, here, again)
    assert again.is_finished
    assert run.metrics.read_text() == before
