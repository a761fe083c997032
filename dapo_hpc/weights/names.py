"""Hugging Face and Megatron names for the same weights, both directions. Pure: torch only.

Megatron fuses what Hugging Face keeps apart (q, k, v; gate, up) and splits every matrix over the
tensor-parallel ranks. The table in families.py says how; here are its two directions. `slices` says
which part of each Hugging Face tensor a rank needs and `join` fuses those parts; `merge` takes the
parameters of all ranks and gives back the tensors, bit by bit.

Legend: tp tensor-parallel ranks, g key-value heads, h query heads, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dapo_hpc.weights.families import (
    EMBEDDING,
    FAMILIES,
    FINAL_NORM,
    OUTPUT,
    Dim,
    Family,
    Kind,
    Parameter,
)

LAYERS = "decoder.layers."
FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""What TransformerEngine's layers call their norms, which lie in the matrix product behind them."""
Index = tuple[slice, ...]
"""A part of a tensor: one slice for each dimension."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes that decide every tensor's shape."""

    family: str
    """model_type of the config; a key of FAMILIES."""
    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    is_tied: bool
    """The output layer uses the embedding's weight; Hugging Face files then hold no lm_head."""

    @classmethod
    def of(cls, hf: Any) -> ModelShape:
        """From a transformers config of one of the families."""
        return cls(
            family=hf.model_type,
            num_layers=hf.num_hidden_layers,
            hidden=hf.hidden_size,
            heads=hf.num_attention_heads,
            kv_heads=hf.num_key_value_heads,
            head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            ffn=hf.intermediate_size,
            vocab=hf.vocab_size,
            is_tied=bool(hf.tie_word_embeddings),
        )

    @property
    def has_qkv_bias(self) -> bool:
        return "self_attention.linear_qkv.bias" in self.tables.layer

    @property
    def has_qk_norm(self) -> bool:
        return "self_attention.q_layernorm.weight" in self.tables.layer

    @property
    def tables(self) -> Family:
        return FAMILIES[self.family]

    def padded_vocab(self, tp: int) -> int:
        """Vocabulary rows in Megatron: the next multiple of tp."""
        return -(-self.vocab // tp) * tp

    def sizes(self, dims: Sequence[Dim]) -> tuple[int, ...]:
        table: dict[Dim, int] = {
            "hidden": self.hidden,
            "query": self.heads * self.head_dim,
            "key_value": self.kv_heads * self.head_dim,
            "head": self.head_dim,
            "ffn": self.ffn,
            "vocab": self.vocab,
        }
        return tuple(table[dim] for dim in dims)


@dataclass(frozen=True, slots=True)
class Entry:
    """One Megatron parameter and the Hugging Face tensors it is made of."""

    kind: Kind
    hf_shapes: dict[str, tuple[int, ...]]
    """Name -> shape of the whole tensor, in the order in which they are fused."""

    @property
    def hf_names(self) -> tuple[str, ...]:
        return tuple(self.hf_shapes)


def entry(shape: ModelShape, megatron_name: str, *, first_layer: int = 0) -> Entry:
    """Which Hugging Face tensors a Megatron parameter holds.

    Args:
        shape: of the model.
        megatron_name: as in GPTModel.named_parameters(), of plain or fused layers.
        first_layer: global number (from 0) of this pipeline stage's layer 0.

    Raises:
        ValueError: a parameter that the family does not have.
    """
    tables, megatron_name = shape.tables, plain_name(megatron_name)
    if megatron_name in tables.top:
        # The last pipeline stage of a tied model holds a copy of the embedding as its output layer.
        is_copy = shape.is_tied and megatron_name == OUTPUT
        return _entry(shape, tables.top[EMBEDDING if is_copy else megatron_name], "")
    number, _, rest = megatron_name.removeprefix(LAYERS).partition(".")
    if rest not in tables.layer:
        raise ValueError(
            f"Megatron parameter {megatron_name} has no Hugging Face counterpart in the family "
            f"{shape.family}. Add it to dapo_hpc/weights/families.py."
        )
    prefix = f"{tables.layer_prefix}{int(number) + first_layer}."
    return _entry(shape, tables.layer[rest], prefix)


def fused_name(megatron_name: str) -> str:
    """A parameter's name in fused layers, from that in plain ones."""
    return _renamed(megatron_name, FUSED_NORMS)


def plain_name(megatron_name: str) -> str:
    """The inverse of `fused_name`; plain names stay."""
    return _renamed(megatron_name, {fused: plain for plain, fused in FUSED_NORMS.items()})


def _renamed(megatron_name: str, table: Mapping[str, str]) -> str:
    number, _, rest = megatron_name.removeprefix(LAYERS).partition(".")
    is_renamed = megatron_name.startswith(LAYERS) and rest in table
    return f"{LAYERS}{number}.{table[rest]}" if is_renamed else megatron_name


def _entry(shape: ModelShape, parameter: Parameter, prefix: str) -> Entry:
    tensors = parameter.tensors.items()
    return Entry(parameter.kind, {prefix + name: shape.sizes(dims) for name, dims in tensors})


def megatron_names(shape: ModelShape, first_layer: int, num_layers: int) -> list[str]:
    """Parameters of one pipeline stage in a fixed order, the same on every rank.

    A tied output layer is listed nowhere: its weight is the embedding's.
    """
    is_first, is_last = first_layer == 0, first_layer + num_layers == shape.num_layers
    names = [EMBEDDING] if is_first else []
    names += [f"{LAYERS}{i}.{name}" for i in range(num_layers) for name in shape.tables.layer]
    names += [FINAL_NORM] if is_last else []
    return names + ([OUTPUT] if is_last and not shape.is_tied else [])


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of a model with its shape, in the order of `megatron_names`."""
    found: dict[str, tuple[int, ...]] = {}
    for name in megatron_names(shape, 0, shape.num_layers):
        found |= entry(shape, name).hf_shapes
    return found


def local_shape(entry: Entry, shape: ModelShape, tp: int) -> tuple[int, ...]:
    """Shape of a Megatron parameter on each of tp ranks."""
    sizes = list(entry.hf_shapes.values())
    rows, tail = sum(size[0] for size in sizes), sizes[0][1:]
    if entry.kind == "replicated":
        return sizes[0]
    if entry.kind == "vocab":
        return (shape.padded_vocab(tp) // tp, *tail)
    if entry.kind == "row":
        return (rows, tail[0] // tp)
    return (rows // tp, *tail)


def max_pieces(shape: ModelShape, limit: int) -> int:
    """The largest tp up to `limit` that splits heads and feed-forward evenly."""
    common = math.gcd(shape.heads, shape.kv_heads, shape.ffn)
    return max(tp for tp in range(1, limit + 1) if common % tp == 0)


def slices(entry: Entry, shape: ModelShape, tp: int, rank: int) -> list[Index]:
    """Which part of each Hugging Face tensor tensor-parallel rank `rank` of `tp` needs."""
    sizes = list(entry.hf_shapes.values())
    whole = [tuple(slice(0, size) for size in tensor) for tensor in sizes]
    if entry.kind == "replicated":
        return whole
    if entry.kind == "row":
        rows, columns = sizes[0]
        return [(slice(0, rows), _share(columns, tp, rank))]
    if entry.kind == "vocab":
        return [(_share(shape.padded_vocab(tp), tp, rank, limit=shape.vocab), *whole[0][1:])]
    return [
        (_share(size[0], tp, rank), *index[1:]) for size, index in zip(sizes, whole, strict=True)
    ]


def _share(size: int, tp: int, rank: int, limit: int | None = None) -> slice:
    """The rank's share of `size` places, none of them beyond `limit`."""
    each, limit = size // tp, size if limit is None else limit
    return slice(min(each * rank, limit), min(each * (rank + 1), limit))


def join(entry: Entry, parts: Sequence[Tensor], shape: ModelShape, tp: int) -> Tensor:
    """What `slices` chose of each Hugging Face tensor -> the rank's Megatron parameter."""
    if entry.kind == "vocab":
        padding = local_shape(entry, shape, tp)[0] - len(parts[0])
        return _cat([parts[0], parts[0].new_zeros(padding, shape.hidden)] if padding else parts)
    if entry.kind == "qkv":
        return _interleave(parts, shape.kv_heads // tp)
    return _cat(parts)


def merge(kind: Kind, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
    """The parameters of all tensor-parallel ranks, in order -> Hugging Face tensors."""
    if kind == "replicated":
        return [shards[0]]
    if kind == "vocab":
        return [_cat(shards)[: shape.vocab]]
    if kind == "qkv":
        return _separate(_cat(shards), shape)
    if kind == "gate_up":
        halves = [s.chunk(2, 0) for s in shards]
        return [_cat([half[i] for half in halves]) for i in (0, 1)]
    return [_cat(shards, 1)]


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Without a copy where there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _interleave(tensors: Sequence[Tensor], groups: int) -> Tensor:
    """q [h d, ...], k and v [g d, ...] -> [g (h/g + 2) d, ...]: each group's q rows, k, v."""
    tail = tensors[0].shape[1:]
    return torch.cat([t.reshape(groups, -1, *tail) for t in tensors], 1).reshape(-1, *tail)


def _separate(fused: Tensor, shape: ModelShape) -> list[Tensor]:
    tail = fused.shape[1:]
    query_rows = shape.heads // shape.kv_heads * shape.head_dim
    groups = fused.reshape(shape.kv_heads, query_rows + 2 * shape.head_dim, *tail)
    parts = torch.split(groups, [query_rows, shape.head_dim, shape.head_dim], dim=1)
    return [part.reshape(-1, *tail) for part in parts]
