"""A stand-in for TransformerEngine, which is made for GPUs: its layers in plain torch, one rank.

What is real beside it is Megatron's side: its wrappers of these classes, the spec they are built
from, their parameters' names and their places in a checkpoint. What it says of TransformerEngine's
own arithmetic is nothing.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, Parameter

VERSION = "1.12.0"


class Linear(Module):
    """x W^T + b; `return_bias` hands the bias over instead."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        return_bias: bool,
        params_dtype: torch.dtype,
        parallel_mode: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.parallel_mode, self.return_bias = parallel_mode, return_bias
        self.weight = Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
        self.bias = Parameter(torch.empty(out_features, dtype=params_dtype)) if bias else None

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        del is_first_microbatch
        if self.return_bias:
            return F.linear(x, self.weight), self.bias
        return F.linear(x, self.weight, self.bias)


class RMSNorm(Module):
    def __init__(
        self, hidden_size: int, *, eps: float, params_dtype: torch.dtype, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = Parameter(torch.ones(hidden_size, dtype=params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class LayerNormLinear(Linear):
    """The norm in front of the product."""

    def __init__(self, *sizes: Any, eps: float, normalization: str, **more: Any) -> None:
        super().__init__(*sizes, **more)
        assert normalization == "RMSNorm"
        self.eps = eps
        self.layer_norm_weight = Parameter(torch.ones(self.in_features, dtype=more["params_dtype"]))

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        x = F.rms_norm(x, (x.shape[-1],), self.layer_norm_weight, self.eps)
        return super().forward(x, is_first_microbatch)


class DotProductAttention(Module):
    """Packed rows only, sequence by sequence, with a mask written out."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: str,
        qkv_format: str,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        max_seqlen_q: int,
        **_: Any,
    ) -> Tensor:
        assert (attn_mask_type, qkv_format, attention_mask) == ("padding_causal", "thd", None)
        bounds = cu_seqlens_q.tolist()
        assert bounds == cu_seqlens_kv.tolist()
        assert bounds[-1] == len(query)
        assert max_seqlen_q == max(b - a for a, b in zip(bounds, bounds[1:], strict=False))
        rows = []
        for start, end in zip(bounds, bounds[1:], strict=False):
            q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
            k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
            scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
            later = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(later, -torch.inf).softmax(-1)
            rows.append((weights @ v).transpose(0, 1).reshape(end - start, -1))
        return torch.cat(rows)


class Unused:
    """What Megatron derives classes from that the learner does not use."""


def install() -> None:
    """To be called before Megatron is imported."""
    contents: dict[str, dict[str, object]] = {
        "": {"__version__": VERSION},
        ".common": {},
        ".common.recipe": {"DelayedScaling": Unused},
        ".pytorch": {
            "Linear": Linear,
            "LayerNormLinear": LayerNormLinear,
            "LayerNorm": Unused,
            "RMSNorm": RMSNorm,
            "DotProductAttention": DotProductAttention,
            "GroupedLinear": Unused,
        },
        ".pytorch.fp8": {"FP8GlobalStateManager": Unused, "fp8_autocast": None},
        ".pytorch.distributed": {
            "CudaRNGStatesTracker": Unused,
            "activation_recompute_forward": None,
        },
        ".pytorch.float8_tensor": {"Float8Tensor": Unused},
        ".pytorch.cpp_extensions": {"cast_to_fp8": None},
    }
    for name, values in contents.items():
        _add_module(f"transformer_engine{name}", values)


def _add_module(name: str, contents: dict[str, object]) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    vars(module).update(contents)
    sys.modules[name] = module
    parent, _, own = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], own, module)
