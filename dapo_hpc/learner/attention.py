"""Attention over packed sequences, and the norm: our two modules inside Megatron's layers.

A micro-batch is one row of T tokens that holds many sequences one after the other. Everything but
attention treats it as T independent tokens. Attention works per sequence and never builds a [T, T]
mask: on CUDA in bf16 by torch's variable-length kernel, elsewhere by right-padding runs of
sequences of similar length (causal attention with padding on the right needs no mask, because no
real token looks at a later one).

Legend: T tokens, B sequences of one run, S its longest length, h heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from dapo_hpc.learner.context import Chunk, Share, chunks

MAX_PADDED_SHARE = 1.25
"""A run is closed when padding would make it this much larger than its tokens."""
MIN_RUN_TOKENS = 1024
"""Runs smaller than this are not worth a separate kernel launch, whatever their padding."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive sequences that attend in one padded batch."""

    start: int
    """First token of the run in the packed row."""
    end: int
    num_sequences: int
    longest: int
    slots: Tensor | None
    """[end - start] int64: place of each token in the [B * S] padded batch; None: no padding."""


@dataclass(frozen=True, slots=True)
class ContextParts:
    """What the queries of this rank's part of a row attend to among the keys of all parts."""

    group: Any
    """The ranks that hold the parts."""
    chunks: tuple[tuple[int, int, Tensor], ...]
    """First query, end of the queries, and the places of their keys; see context.Chunk."""
    cu_queries: Tensor
    """[chunks + 1] int32."""
    cu_keys: Tensor
    max_queries: int
    max_keys: int

    @classmethod
    def of(cls, chunks: list[Chunk], group: Any, device: torch.device) -> ContextParts:
        queries = np.array([chunk.end - chunk.start for chunk in chunks])
        keys = np.array([len(chunk.keys) for chunk in chunks])

        def ends(counts: np.ndarray) -> Tensor:
            return torch.from_numpy(np.append(0, np.cumsum(counts)).astype(np.int32)).to(device)

        return cls(
            group=group,
            chunks=tuple((c.start, c.end, torch.from_numpy(c.keys).to(device)) for c in chunks),
            cu_queries=ends(queries),
            cu_keys=ends(keys),
            max_queries=int(queries.max()),
            max_keys=int(keys.max()),
        )


@dataclass
class PackedSequences(PackedSeqParams):  # type: ignore[misc]  # Megatron has no types
    """Megatron's description of a packed row, with what our attention needs beside it."""

    positions: Tensor = field(default_factory=lambda: torch.empty(0))
    """[T] int32: of each token within its sequence."""
    runs: tuple[Run, ...] = ()
    cos: Tensor | None = None
    """[T, 1, d / 2] float32: rotary angles by position. A row has them only while it passes through
    the model: for all rows of a step they would take more memory than the model's activations."""
    sin: Tensor | None = None
    parts: ContextParts | None = None
    """Where the row is one of several ranks' parts of a longer one."""

    def with_angles(self, rotary: RotaryTable) -> PackedSequences:
        """For one pass through the model."""
        cos, sin = rotary.at(self.positions)
        return replace(self, cos=cos, sin=sin)


class RotaryTable:
    """cos and sin for every position, as transformers computes them for the same config."""

    def __init__(self, inverse_frequencies: Tensor, scaling: float, device: torch.device) -> None:
        self._inverse_frequencies = inverse_frequencies.to(device=device, dtype=torch.float32)
        self._scaling = scaling

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin: each [T, 1, d / 2] float32 for positions [T]."""
        angles = positions.to(torch.float32)[:, None, None] * self._inverse_frequencies
        return angles.cos() * self._scaling, angles.sin() * self._scaling


def describe(lengths: np.ndarray, device: torch.device) -> PackedSequences:
    """Everything attention needs to know about a packed row but the angles.

    Args:
        lengths: [B] tokens of each sequence, in packed order; their sum is T.
        device: of the model.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)
    cu_seqlens = torch.from_numpy(ends.astype(np.int32)).to(device)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=int(lengths.max()),
        max_seqlen_kv=int(lengths.max()),
        positions=torch.from_numpy(positions.astype(np.int32)).to(device),
        runs=tuple(_run(lengths, ends, a, b, device) for a, b in run_bounds(lengths)),
    )


def describe_share(
    lengths: np.ndarray, every: list[Share], rank: int, group: Any, device: torch.device
) -> PackedSequences:
    """`describe` of one rank's part of a row.

    Args:
        lengths: [B] tokens of each sequence of the whole row.
        every: `context.shares` of it.
        rank: which of them.
        group: the ranks that hold them, in order.
        device: of the model.
    """
    starts = np.repeat(np.append(0, np.cumsum(lengths))[:-1], lengths)
    positions = every[rank].take((np.arange(len(starts)) - starts).astype(np.int32))
    parts = ContextParts.of(chunks(lengths, every, rank), group, device)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=parts.cu_queries,
        cu_seqlens_kv=parts.cu_keys,
        max_seqlen_q=parts.max_queries,
        max_seqlen_kv=parts.max_keys,
        positions=torch.from_numpy(positions).to(device),
        parts=parts,
    )


def run_bounds(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Cut sequences into runs [first, last) whose padding stays small.

    A run grows while its padded size is at most MAX_PADDED_SHARE of its tokens, or at most
    MIN_RUN_TOKENS.
    """
    bounds: list[tuple[int, int]] = []
    first, tokens, longest = 0, 0, 0
    for i, length in enumerate(int(n) for n in lengths):
        padded = max(longest, length) * (i + 1 - first)
        limit = max(MAX_PADDED_SHARE * (tokens + length), MIN_RUN_TOKENS)
        if i > first and padded > limit:
            bounds.append((first, i))
            first, tokens, longest = i, 0, 0
        tokens, longest = tokens + length, max(longest, length)
    return [*bounds, (first, len(lengths))]


def _run(lengths: np.ndarray, ends: np.ndarray, a: int, b: int, device: torch.device) -> Run:
    inside, longest = lengths[a:b], int(lengths[a:b].max())
    start, end = int(ends[a]), int(ends[b])
    slots = None
    if int(inside.min()) < longest:
        within = np.arange(start, end) - np.repeat(ends[a:b], inside)
        rows = np.repeat(np.arange(b - a) * longest, inside) + within
        slots = torch.from_numpy(rows).to(device)
    return Run(start, end, b - a, longest, slots)


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, for Megatron's layer specs.

    Under sequence parallelism each rank sees a part of the tokens, so the weight's gradient must be
    summed over the tensor-parallel group; Megatron does so for parameters with the mark set here.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(ones)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class PackedAttention(torch.nn.Module):
    """Causal attention within each packed sequence, rotary embedding included.

    The rotation happens here and not in Megatron, which loops over the sequences of a packed row
    in Python (two slices and a concatenation for each).
    """

    def __init__(self, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
        **_: Any,
    ) -> Tensor:
        """[T, h, d], [T, h_kv, d], [T, h_kv, d] -> [T, h * d]."""
        if packed_seq_params is None or attention_mask is not None or attention_bias is not None:
            raise ValueError("packed attention takes PackedSequences and neither mask nor bias.")
        query, key = rotated(query, key, packed_seq_params)
        if packed_seq_params.parts is not None:
            return _attend_over_ranks(query, key, value, packed_seq_params.parts, self.scale)
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            ends = packed_seq_params.cu_seqlens_q, packed_seq_params.cu_seqlens_kv
            longest = packed_seq_params.max_seqlen_q, packed_seq_params.max_seqlen_kv
            return _varlen_kernel(query, key, value, ends, longest, self.scale)
        outputs = [_attend(query, key, value, run, self.scale) for run in packed_seq_params.runs]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def rotated(query: Tensor, key: Tensor, packed: PackedSequences | None) -> tuple[Tensor, Tensor]:
    """Query [T, h, d] and key [T, h_kv, d] with the rotary embedding of each token's position."""
    if packed is None or packed.cos is None or packed.sin is None:
        raise ValueError("packed attention needs angles; pass sequences.with_angles(rotary).")
    cos, sin = packed.cos, packed.sin
    return _apply(_Rotate, query, cos, sin), _apply(_Rotate, key, cos, sin)


def _attend_over_ranks(
    query: Tensor, key: Tensor, value: Tensor, parts: ContextParts, scale: float | None
) -> Tensor:
    """[T', h, d], [T', h_kv, d], [T', h_kv, d] of this rank -> [T', h * d]."""
    both: Tensor = gather_from_sequence_parallel_region(
        torch.cat([key, value], dim=1), group=parts.group
    )
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        places = torch.cat([keys for _, _, keys in parts.chunks])
        key, value = both.index_select(0, places).chunk(2, dim=1)
        ends, longest = (parts.cu_queries, parts.cu_keys), (parts.max_queries, parts.max_keys)
        return _varlen_kernel(query, key, value, ends, longest, scale)
    outputs = []
    for start, end, keys in parts.chunks:
        key, value = both.index_select(0, keys).chunk(2, dim=1)
        outputs.append(_attend_to_prefix(query[start:end], key, value, scale))
    return torch.cat(outputs)


def _attend_to_prefix(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """The last n of k tokens look at what is before them.

    [n, h, d], [k, h_kv, d], [k, h_kv, d] -> [n, h * d].
    """
    n, k = len(query), len(key)
    mask = torch.ones(n, k, dtype=torch.bool, device=query.device).tril(k - n)
    q, k_, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    has_groups = query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(
        q, k_, v, attn_mask=mask, scale=scale, enable_gqa=has_groups
    )
    return output[0].transpose(0, 1).reshape(n, -1)


def _varlen_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float | None,
) -> Tensor:
    """Of queries and keys that end at `ends`; the last query of each run sees all of its keys."""
    from torch.nn.attention.varlen import varlen_attn

    output: Any = varlen_attn(
        query,
        key,
        value,
        *ends,
        *longest,
        scale=scale,
        window_size=(-1, 0),  # everything before the token, nothing after it
        enable_gqa=query.shape[1] != key.shape[1],
    )
    rows: Tensor = output.reshape(query.shape[0], -1)
    return rows


def _attend(query: Tensor, key: Tensor, value: Tensor, run: Run, scale: float | None) -> Tensor:
    """Attention of one run: [n, h * d] for its n tokens."""
    q, k, v = (_padded(x[run.start : run.end], run) for x in (query, key, value))
    has_groups = query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=has_groups
    )
    rows = output.transpose(1, 2).reshape(run.num_sequences * run.longest, -1)
    return rows if run.slots is None else _apply(_Unpad, rows, run.slots)


def _padded(x: Tensor, run: Run) -> Tensor:
    """[n, h, d] -> [B, h, S, d]."""
    if run.slots is not None:
        x = _apply(_Pad, x, run.slots, run.num_sequences * run.longest)
    return x.view(run.num_sequences, run.longest, *x.shape[1:]).transpose(1, 2)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    output: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]  # untyped in torch
    return output


class _Rotate(torch.autograd.Function):
    """Rotary embedding in the half-split convention; the gradient is the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype)


class _Pad(torch.autograd.Function):
    """Rows to their slots in a zeroed batch; index_select in the backward pass, not index_add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, num_slots: int) -> Tensor:
        ctx.save_for_backward(slots)
        return x.new_zeros(num_slots, *x.shape[1:]).index_copy_(0, slots, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return grad.index_select(0, slots), None, None


class _Unpad(torch.autograd.Function):
    """The inverse of _Pad: the rows at the slots."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.num_slots = rows.shape[0]
        return rows.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        zeros = grad.new_zeros(ctx.num_slots, grad.shape[1])
        return zeros.index_copy_(0, slots, grad), None
