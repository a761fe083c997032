"""Which layers the model is made of: Megatron's own with our norm and attention, or those of
TransformerEngine.

                     plain                           fused
    where            anywhere                        CUDA, bfloat16, TransformerEngine installed
    norm             RMSNorm of attention.py         inside the matrix product behind it
    attention        PackedAttention                 TransformerEngine's, on packed rows
    rotary angles    ours, in front of attention     the same

Both have the same parameters: the two norms of a fused layer are called otherwise
(dapo_hpc.weights.names), and a checkpoint of one is read by the other.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dapo_hpc.learner.attention import PackedAttention, PackedSequences, RMSNorm, rotated


def uses_transformer_engine(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `fused` layers are to be built; its attention takes no packed rows of float32.

    Raises ValueError when TransformerEngine is installed and Megatron could not import it.
    """
    is_installed = find_spec("transformer_engine") is not None
    if not is_installed or device.type != "cuda" or dtype != torch.bfloat16:
        return False
    if not gpt_layer_specs.HAVE_TE:
        raise ValueError(
            "TransformerEngine is installed, but Megatron-Core could not import it. See what "
            "`python -c 'import transformer_engine.pytorch'` says and repair it, or uninstall it: "
            "the learner then uses its own layers."
        )
    return True


def plain(config: TransformerConfig) -> TransformerBlockSubmodules:
    """For CPU, and for a GPU without TransformerEngine."""
    spec = gpt_layer_specs.get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return _block(config, spec, RMSNorm)


def fused(config: TransformerConfig) -> TransformerBlockSubmodules:
    """TransformerEngine's layers; it must be installed."""
    from megatron.core.extensions.transformer_engine import TENorm

    spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        qk_layernorm=config.qk_layernorm
    )
    attention = spec.submodules.self_attention.submodules
    if config.context_parallel_size > 1:
        attention.core_attention = PackedAttention
    else:
        attention.core_attention = after_rotation(attention.core_attention)
    return _block(config, spec, TENorm)


def _block(config: TransformerConfig, spec: Any, norm: Any) -> TransformerBlockSubmodules:
    num_layers = get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=norm)


def after_rotation(core_attention: type) -> type:
    """A class of attention that gets query and key with their rotary embedding."""
    return type(f"Rotary{core_attention.__name__}", (_Rotation, core_attention), {})


class _Rotation:
    """In front of an attention class."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *mask: Any,
        packed_seq_params: PackedSequences | None = None,
        **more: Any,
    ) -> Tensor:
        """[T, h, d], [T, h_kv, d], [T, h_kv, d] -> what the attention class gives."""
        query, key = rotated(query, key, packed_seq_params)
        attend: Any = super()
        output: Tensor = attend.forward(
            query, key, value, *mask, packed_seq_params=packed_seq_params, **more
        )
        return output
