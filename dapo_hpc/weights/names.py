"""Hugging Face and Megatron names for the same weights, both directions. Pure: torch only.

Megatron fuses what Hugging Face keeps apart (q, k, v; gate, up) and splits every matrix over the
tensor-parallel ranks. One table says how; `shard` and `merge` are the two directions of it, and
`merge(kind, [shard(kind, x, tp, r) for r in range(tp)]) == x`, bit by bit.

Legend: tp tensor-parallel ranks, g key-value heads, h query heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["replicated", "vocab", "row", "qkv", "gate_up"]

LAYER: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "input_layernorm.weight": ("replicated", ("input_layernorm.weight",)),
    "pre_mlp_layernorm.weight": ("replicated", ("post_attention_layernorm.weight",)),
    "self_attention.linear_qkv.weight": (
        "qkv",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ),
    "self_attention.linear_qkv.bias": (
        "qkv",
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    ),
    "self_attention.linear_proj.weight": ("row", ("self_attn.o_proj.weight",)),
    "self_attention.q_layernorm.weight": ("replicated", ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": ("replicated", ("self_attn.k_norm.weight",)),
    "mlp.linear_fc1.weight": ("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": ("row", ("mlp.down_proj.weight",)),
}
"""Within one decoder layer: Megatron's name -> how it is split, Hugging Face's names."""

TOP: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "embedding.word_embeddings.weight": ("vocab", ("model.embed_tokens.weight",)),
    "decoder.final_layernorm.weight": ("replicated", ("model.norm.weight",)),
    "output_layer.weight": ("vocab", ("lm_head.weight",)),
}

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes that decide every tensor's shape."""

    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    has_qkv_bias: bool
    has_qk_norm: bool
    is_tied: bool
    """The output layer uses the embedding's weight; Hugging Face files then hold no lm_head."""

    @classmethod
    def of(cls, hf: Any) -> ModelShape:
        """From a transformers config of a dense Qwen2, Qwen3 or Llama model."""
        return cls(
            num_layers=hf.num_hidden_layers,
            hidden=hf.hidden_size,
            heads=hf.num_attention_heads,
            kv_heads=hf.num_key_value_heads,
            head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            ffn=hf.intermediate_size,
            vocab=hf.vocab_size,
            has_qkv_bias=hf.model_type == "qwen2",
            has_qk_norm=hf.model_type == "qwen3",
            is_tied=bool(hf.tie_word_embeddings),
        )

    def padded_vocab(self, tp: int) -> int:
        """Vocabulary rows in Megatron: the next multiple of tp."""
        return -(-self.vocab // tp) * tp


@dataclass(frozen=True, slots=True)
class Entry:
    """One Megatron parameter and the Hugging Face tensors it is made of."""

    kind: Kind
    hf_names: tuple[str, ...]


def entry(megatron_name: str, *, first_layer: int, is_tied: bool) -> Entry:
    """Which Hugging Face tensors a Megatron parameter holds.

    Args:
        megatron_name: as in GPTModel.named_parameters().
        first_layer: global number (from 0) of this pipeline stage's layer 0.
        is_tied: an output layer that holds a copy of the embedding (last pipeline stage).

    Raises:
        ValueError: a parameter that no dense Qwen2, Qwen3 or Llama model has.
    """
    if megatron_name in TOP:
        kind, names = TOP[megatron_name]
        is_copy = is_tied and names == (OUTPUT,)
        return Entry(kind, (EMBEDDING,) if is_copy else names)
    number, _, rest = megatron_name.removeprefix("decoder.layers.").partition(".")
    if rest not in LAYER:
        raise ValueError(
            f"Megatron parameter {megatron_name} has no Hugging Face counterpart here; expected "
            "a dense Qwen2, Qwen3 or Llama model. Add it to dapo_hpc/weights/names.py."
        )
    kind, names = LAYER[rest]
    return Entry(kind, tuple(f"model.layers.{int(number) + first_layer}.{n}" for n in names))


def megatron_names(shape: ModelShape, first_layer: int, num_layers: int) -> list[str]:
    """Parameters of one pipeline stage in a fixed order, the same on every rank.

    A tied output layer is listed nowhere: its weight is the embedding's.
    """
    is_first, is_last = first_layer == 0, first_layer + num_layers == shape.num_layers
    names = ["embedding.word_embeddings.weight"] if is_first else []
    skipped = [] if shape.has_qkv_bias else ["self_attention.linear_qkv.bias"]
    if not shape.has_qk_norm:
        skipped += ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]
    inner = [name for name in LAYER if name not in skipped]
    names += [f"decoder.layers.{i}.{name}" for i in range(num_layers) for name in inner]
    names += ["decoder.final_layernorm.weight"] if is_last else []
    return names + (["output_layer.weight"] if is_last and not shape.is_tied else [])


def hf_shape(name: str, shape: ModelShape) -> tuple[int, ...]:
    """Shape of a Hugging Face tensor."""
    if name in (EMBEDDING, OUTPUT):
        return (shape.vocab, shape.hidden)
    module, _, leaf = name.rpartition(".")
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    rows = {"q_proj": query, "k_proj": key_value, "v_proj": key_value}
    last = module.rpartition(".")[2]
    if last in rows:
        return (rows[last],) if leaf == "bias" else (rows[last], shape.hidden)
    matrices = {
        "o_proj": (shape.hidden, query),
        "gate_proj": (shape.ffn, shape.hidden),
        "up_proj": (shape.ffn, shape.hidden),
        "down_proj": (shape.hidden, shape.ffn),
    }
    if last in matrices:
        return matrices[last]
    return (shape.head_dim,) if last in ("q_norm", "k_norm") else (shape.hidden,)


def shard(kind: Kind, tensors: Sequence[Tensor], shape: ModelShape, tp: int, rank: int) -> Tensor:
    """Hugging Face tensors -> the part that tensor-parallel rank `rank` of `tp` holds."""
    if kind == "replicated":
        return tensors[0]
    if kind == "vocab":
        padding = shape.padded_vocab(tp) - shape.vocab
        rows = torch.cat([tensors[0], tensors[0].new_zeros(padding, shape.hidden)])
        return rows.chunk(tp, 0)[rank]
    if kind == "qkv":
        return _interleave(tensors, shape).chunk(tp, 0)[rank]
    if kind == "gate_up":
        return torch.cat([t.chunk(tp, 0)[rank] for t in tensors])
    return tensors[0].chunk(tp, 1)[rank]


def merge(kind: Kind, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
    """The parts of all tensor-parallel ranks, in order -> Hugging Face tensors."""
    if kind == "replicated":
        return [shards[0]]
    if kind == "vocab":
        return [torch.cat(list(shards))[: shape.vocab]]
    if kind == "qkv":
        return _separate(torch.cat(list(shards)), shape)
    if kind == "gate_up":
        halves = [s.chunk(2, 0) for s in shards]
        return [torch.cat([half[i] for half in halves]) for i in (0, 1)]
    return [torch.cat(list(shards), 1)]


def _interleave(tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """q [h d, ...], k and v [g d, ...] -> [g (h/g + 2) d, ...]: each group's q rows, k, v."""
    tail = tensors[0].shape[1:]
    groups = [t.reshape(shape.kv_heads, -1, *tail) for t in tensors]
    return torch.cat(groups, 1).reshape(-1, *tail)


def _separate(fused: Tensor, shape: ModelShape) -> list[Tensor]:
    tail = fused.shape[1:]
    query_rows = shape.heads // shape.kv_heads * shape.head_dim
    groups = fused.reshape(shape.kv_heads, query_rows + 2 * shape.head_dim, *tail)
    parts = torch.split(groups, [query_rows, shape.head_dim, shape.head_dim], dim=1)
    return [part.reshape(-1, *tail) for part in parts]
