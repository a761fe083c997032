"""TransformerEngine's layers, with a stand-in for TransformerEngine: names, shapes, rotation,
gradients and checkpoints agree with the plain layers, and log-probs with transformers.

What the real one computes on a GPU is not tested here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
from torch import Tensor

from dapo_hpc.weights import names
from tests.unit.learner import fused_layers
from tests.unit.learner.fused_layers import LENGTHS, MODELS, tokens

TOLERANCE = 2e-5
"""Of log-probs of about -4 and gradients of about 1, float32, summed in another order."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fused")
    code = f"from {fused_layers.__name__} import Path, main; main(Path({str(root)!r}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return root


@pytest.fixture(params=list(MODELS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def found(root: Path, family: str) -> dict[str, Any]:
    everything: dict[str, Any] = torch.load(root / "found.pt")
    return everything[family]


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_norms_lie_in_the_products_behind_them(found: dict[str, Any]) -> None:
    plain, fused = (set(found[kind]["names"]) for kind in ("plain", "fused"))
    assert {names.fused_name(name) for name in plain} == fused
    assert {names.plain_name(name) for name in fused} == plain
    assert {name.rpartition("layers.")[2] for name in fused - plain} == {
        f"{layer}.{norm}"
        for layer in (0, 1)
        for norm in (
            "self_attention.linear_qkv.layer_norm_weight",
            "mlp.linear_fc1.layer_norm_weight",
        )
    }


def test_log_probs_are_those_of_transformers(
    found: dict[str, Any], root: Path, family: str
) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(root / family).float()
    expected = []
    for ids in tokens().split(LENGTHS):
        logits = model(ids[None]).logits[0].log_softmax(-1)
        expected.append(logits[torch.arange(len(ids) - 1), ids[1:]])
    ends = torch.tensor(LENGTHS).cumsum(0) - 1  # the last place of a sequence has no target
    is_inside = torch.ones(sum(LENGTHS), dtype=torch.bool).index_fill(0, ends, False)
    for kind in ("plain", "fused"):
        difference = found[kind]["logprobs"][is_inside] - torch.cat(expected)
        assert difference.abs().max() < TOLERANCE, kind
    shifted = found["fused"]["logprobs"].roll(1)[is_inside] - torch.cat(expected)
    assert shifted.abs().max() > 100 * TOLERANCE, "negative control"


def test_gradients_are_those_of_plain_layers(found: dict[str, Any]) -> None:
    plain, fused = found["plain"]["grads"], found["fused"]["grads"]
    assert plain.keys() == fused.keys()
    for name, gradient in plain.items():
        assert gradient.abs().max() > 100 * TOLERANCE, name
        torch.testing.assert_close(fused[name], gradient, atol=TOLERANCE, rtol=TOLERANCE)


def test_export_and_import_have_the_bits_of_the_files(
    found: dict[str, Any], root: Path, family: str
) -> None:
    from safetensors.torch import load_file

    stored = load_file(root / family / "model.safetensors")
    assert equal(found["fused"]["exported"], stored)
    assert equal(found["fused"]["imported"], found["plain"]["imported"])


@pytest.mark.parametrize("way", ["plain to fused", "fused to plain", "fused to fused"])
def test_checkpoints_pass_between_the_two(way: str, found: dict[str, Any]) -> None:
    saved, loaded = found[way]
    assert equal(saved, loaded)
    assert not equal(
        {name: saved[name] for name in found["plain"]["imported"]}, found["plain"]["imported"]
    ), "it was trained"


def test_only_a_gpu_with_bfloat16_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from dapo_hpc.learner import spec

    cuda, host = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(spec, "find_spec", lambda _name: object())
    with pytest.raises(ValueError, match="installed, but Megatron-Core could not import it"):
        spec.uses_transformer_engine(cuda, torch.bfloat16)
    monkeypatch.setattr(spec.gpt_layer_specs, "HAVE_TE", True)
    assert spec.uses_transformer_engine(cuda, torch.bfloat16)
    assert not spec.uses_transformer_engine(cuda, torch.float32)
    assert not spec.uses_transformer_engine(host, torch.bfloat16)
    monkeypatch.setattr(spec, "find_spec", lambda _name: None)
    assert not spec.uses_transformer_engine(cuda, torch.bfloat16)
