"""A run that starts from what `dapo import` wrote is the run that starts from model.path."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
from safetensors.torch import load_file
from torch import Tensor

from dapo_hpc.config import RunConfig
from dapo_hpc.learner.convert import import_model
from dapo_hpc.learner.model import Policy
from dapo_hpc.learner.parallel import Layout, Processes, connect, disconnect
from dapo_hpc.learner.session import open_session
from dapo_hpc.learner.start import load_start
from dapo_hpc.learner.train import train
from dapo_hpc.observe.final import Final
from dapo_hpc.plan import make_plan
from dapo_hpc.run_dir import RunDir
from tests.learner_parts import FakeBuffer, make_config, make_model

FAMILIES = [("qwen2", False), ("qwen3", True), ("llama", False)]


def imported(root: Path, family: str, *, tied: bool, dtype: torch.dtype | None = None) -> RunConfig:
    """A config whose model lies in `root`, imported beside it."""
    make_model(root / "model", family, tied=tied)
    disconnect()  # importing plays ranks
    import_model(root / "model", root / "imported", dtype=dtype)
    connect(Layout(), 0, None)
    return with_model(make_config(root / "model", root), imported=str(root / "imported"))


def with_model(config: RunConfig, **values: object) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update=values)})


def weights(config: RunConfig, here: Processes) -> dict[str, Tensor]:
    """Of a policy that held other numbers before."""
    policy = Policy.of(config, Path(config.model.path), here, temperature=1.0)
    for parameter in policy.module.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    load_start(policy, config.model)
    return {name: p.detach().clone() for name, p in policy.module.named_parameters()}


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_both_starts_hold_the_same_bits(
    family: str, tied: bool, here: Processes, tmp_path: Path
) -> None:
    config = imported(tmp_path, family, tied=tied)
    first, second = weights(config, here), weights(with_model(config, imported=None), here)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_are_rounded_on_the_way_as_from_safetensors(
    dtype: str, here: Processes, tmp_path: Path
) -> None:
    """An import in bfloat16, trained in float32, starts from the rounded numbers."""
    config = imported(tmp_path, "qwen2", tied=False, dtype=torch.bfloat16)
    config = with_model(config, dtype=dtype)
    first, second = weights(config, here), weights(with_model(config, imported=None), here)
    assert {t.dtype for t in first.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(first[name], second[name].bfloat16().to(first[name])) for name in first)
    assert (dtype == "bfloat16") == all(torch.equal(first[n], second[n]) for n in first)


def test_two_runs_end_with_the_same_bits(here: Processes, tmp_path: Path) -> None:
    config = imported(tmp_path, "qwen3", tied=True)
    ends = []
    for chosen in (config, with_model(config, imported=None)):
        root = tmp_path / f"run-{len(ends)}"
        root.mkdir()
        session = open_session(RunDir(root), chosen, here, FakeBuffer())
        train(session)
        ends.append(load_file(root / "model" / "model.safetensors"))
    start = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)
    assert not any(torch.equal(ends[0][name], start[name]) for name in start), "it was trained"


def cut(root: Path) -> None:
    """Cut the last byte off the largest file."""
    path = max(root.glob("*.distcp"), key=lambda file: file.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])


def other_config(root: Path) -> None:
    """The import becomes one of another model."""
    text = (root / "config.json").read_text()
    (root / "config.json").write_text(text.replace('"vocab_size": 33', '"vocab_size": 32'))


def fewer_layers(root: Path) -> None:
    """The weights are of another model than its config, digests and all."""
    shutil.rmtree(root)
    disconnect()
    make_model(root.with_name("other"), "llama")
    import_model(root.with_name("other"), root)
    connect(Layout(), 0, None)
    shutil.copy(root.with_name("model") / "config.json", root)
    (root / "files.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (cut, "imported' is damaged: .* bytes instead of"),
        (other_config, r"is of another model than model\.path: .*vocab=32"),
        (fewer_layers, "imported' cannot be loaded: "),
        (lambda root: (root / "files.json").unlink(), r"is damaged: files\.json"),
    ],
)
def test_what_cannot_be_started_from_is_told(
    damage: Callable[[Path], None], sentence: str, here: Processes, tmp_path: Path
) -> None:
    config = imported(tmp_path, "qwen2", tied=False)
    damage(tmp_path / "imported")
    with pytest.raises(ValueError, match=sentence):
        weights(config, here)


def test_the_learner_refuses_a_layout_in_the_words_of_the_plan(
    here: Processes, tmp_path: Path
) -> None:
    make_model(tmp_path / "model")
    learner = {"data_parallel": 2, "expert_parallel": 2, "tensor_parallel": 3}
    config = make_config(tmp_path / "model", tmp_path, learner=learner)
    expected = make_plan(config, tmp_path).learner_problems
    assert len(expected) == 3, "experts, heads and key-value heads"
    with pytest.raises(Final) as caught:
        open_session(RunDir(tmp_path), config, here, FakeBuffer())
    assert str(caught.value) == " ".join(expected)
