"""What autograd keeps, planned tensor by tensor, against the storages that a real pass keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
import torch.nn.functional as F

from dapo_hpc.config import RunConfig
from dapo_hpc.learner import attention
from dapo_hpc.learner.parallel import Processes
from dapo_hpc.plan.activations import Device, Passes, ends_bytes, layer_bytes, layer_tensors
from dapo_hpc.plan.memory import passes_of
from tests.unit.plan.measuring import (
    architecture,
    build_policy,
    kept_bytes,
    run_config,
    write_model,
)


def planned(config: RunConfig, device: Device = "cpu", **changed: Any) -> int:
    """Kept by all layers and the final norm.

    The gradient that the head hands over is counted with them, but is no tensor that autograd
    keeps.
    """
    passes = replace(passes_of(architecture(config), config), device=device, **changed)
    layers = passes.architecture.num_layers * layer_bytes(passes, config.learner.recompute)
    return layers + ends_bytes(passes, is_last=True) - passes.local_hidden_bytes


def is_exact(measured: int, plan: int) -> bool:
    """To the byte, but for a scalar of a few bytes in each layer of a selective recompute."""
    return 0 <= measured - plan < 64


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("qwen2", "float32"),  # biases of q, k, v
        ("qwen3", "float32"),  # norms on q and k
        ("llama", "float32"),  # neither
        ("qwen2", "bfloat16"),  # norms work on float32 copies
        ("qwen3", "bfloat16"),
    ],
)
def test_every_byte_of_a_pass_is_planned(
    family: str, dtype: str, recompute: str, tmp_path: Path, here: Processes
) -> None:
    config = run_config(write_model(tmp_path, family), dtype, recompute=recompute)
    assert is_exact(kept_bytes(build_policy(config, here), config), planned(config))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_one_key_value_head_makes_q_a_view(family: str, tmp_path: Path, here: Processes) -> None:
    model = write_model(tmp_path, family, num_key_value_heads=1)
    for recompute in ("none", "selective"):
        config = run_config(model, recompute=recompute)
        assert is_exact(kept_bytes(build_policy(config, here), config), planned(config))


def test_a_wrong_plan_is_noticed(tmp_path: Path, here: Processes) -> None:
    """Negative controls: a layer too few, another width, a tensor forgotten."""
    config = run_config(write_model(tmp_path, "qwen3"))
    measured = kept_bytes(build_policy(config, here), config)
    size = architecture(config)
    for wrong in ({"num_layers": 3}, {"ffn": 319}, {"model_type": "qwen2"}):
        assert not is_exact(measured, planned(config, architecture=replace(size, **wrong)))
    passes = passes_of(size, config)
    for name, forgotten in layer_tensors(passes, "none").items():
        assert forgotten > 0, name
        assert not is_exact(measured, planned(config) - size.num_layers * forgotten)


# ------------------------------------------------------------------ the operations of a GPU


class FusedNorm(torch.autograd.Function):
    """Keeps what torch's fused RMSNorm on CUDA keeps: input, one number a row, weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rstd = x.float().square().mean(-1, keepdim=True).add(eps).rsqrt()
        ctx.save_for_backward(x, rstd, weight)
        return (x.float() * rstd * weight).to(x.dtype)


class VariableLengthAttention(torch.autograd.Function):
    """Keeps what torch.nn.attention.varlen keeps: q, k, v, the output, a number a row and head."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(q)
        log_sum_exp = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, output, log_sum_exp)
        return output


@pytest.fixture
def gpu_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's two operations that keep other things on a GPU are replaced by ones that keep those;
    everything around them is real. Values mean nothing."""

    def rms_norm(x: torch.Tensor, _: Any, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return FusedNorm.apply(x, weight, eps)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
        return VariableLengthAttention.apply(q, k, v).reshape(len(q), -1)

    monkeypatch.setattr(F, "rms_norm", rms_norm)
    monkeypatch.setattr(attention, "_attend", attend)


@pytest.mark.usefixtures("gpu_operations")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_every_byte_of_a_gpu_pass_is_planned(
    family: str, kv_heads: int, recompute: str, tmp_path: Path, here: Processes
) -> None:
    """Derived, not measured, in one respect: what the two replaced operations keep."""
    model = write_model(tmp_path, family, num_key_value_heads=kv_heads)
    config = run_config(model, "bfloat16", recompute=recompute)
    measured = kept_bytes(build_policy(config, here), config)
    assert is_exact(measured, planned(config, "cuda"))
    assert not is_exact(measured, planned(config, "cpu"))


def test_torch_says_that_the_fused_norm_keeps_input_and_one_number_a_row() -> None:
    """What FusedNorm stands for, in the formulas that come with torch."""
    import torchgen

    root = Path(torchgen.__file__).parent / "packaged"
    functions = (root / "ATen/native/native_functions.yaml").read_text()
    declared = functions.partition("- func: _fused_rms_norm(")[2][:200]
    assert "CUDA: _fused_rms_norm_cuda" in declared
    formulas = (root / "autograd/derivatives.yaml").read_text()
    formula = formulas.partition("- name: _fused_rms_norm(")[2][:700]
    call = "_fused_rms_norm_backward(grads[0], input, normalized_shape, result1, weight"
    assert call in formula


def test_passes_share_rows_under_sequence_parallelism(tmp_path: Path) -> None:
    config = run_config(write_model(tmp_path), tensor_parallel=2, sequence_parallel=True)
    passes = passes_of(architecture(config), config)
    assert isinstance(passes, Passes)
    assert passes.local_tokens * 2 == passes.tokens
