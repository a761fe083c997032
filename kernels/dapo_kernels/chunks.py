"""How a call from hidden states is cut into chunks of tokens, and which tokens take part.

Letters: T tokens, K of them that take part, H hidden size, C tokens of one chunk, V_local rows of
the weight on this rank, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_kernels import checks
from dapo_kernels.gradients import HiddenGradient
from dapo_kernels.vocab import VocabShard

HiddenGrad = Literal["partial", "all_reduce", "reduce_scatter"]

CHUNK_TOKENS = 2048
"""Large enough that the GEMMs and not the traffic of the weight take the time."""
_TILE = 128
"""Chunks of equal size are rounded up to a multiple of it, a tile of the GEMMs."""
_ALIGNMENT = 16
"""Rows of logits start at a multiple of as many elements, so that loads can be 16 bytes wide."""


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """What holds for all chunks of one call."""

    shard: VocabShard
    inverse_temperature: float
    num_tokens: int
    """T."""
    rows: Tensor | None
    hidden_grad: HiddenGrad
    chunk_tokens: int
    logits_dtype: torch.dtype

    def chunks(self, num_rows: int) -> list[slice]:
        """At most chunk_tokens each, of nearly equal size."""
        if not num_rows:
            return []
        count = -(-num_rows // self.chunk_tokens)
        size = -(-num_rows // count)
        size = min(self.chunk_tokens, -(-size // _TILE) * _TILE)
        return [slice(at, min(at + size, num_rows)) for at in range(0, num_rows, size)]

    def new_logits(self, hidden: Tensor, chunks: list[slice]) -> Tensor:
        """[C, V_local], of the largest chunk."""
        columns = self.shard.num_columns
        padded = -(-columns // _ALIGNMENT) * _ALIGNMENT
        rows = max(chunk.stop - chunk.start for chunk in chunks)
        return hidden.new_empty((rows, padded), dtype=self.logits_dtype)[:, :columns]

    def enter(self, hidden: Tensor) -> Tensor:
        """The K rows that take part, of all tokens."""
        if self.hidden_grad == "reduce_scatter" and self.shard.group is not None:
            everyone = hidden.new_empty((self.num_tokens, hidden.shape[1]))
            if self.num_tokens:
                dist.all_gather_into_tensor(everyone, hidden, group=self.shard.group)
            hidden = everyone
        return hidden if self.rows is None else hidden.index_select(0, self.rows)

    def select(self, per_token: Tensor) -> Tensor:
        return per_token if self.rows is None else per_token.index_select(0, self.rows)

    def spread(self, per_row: Tensor) -> Tensor:
        """[K] -> [T], 0 where a token takes no part."""
        if self.rows is None:
            return per_row
        return per_row.new_zeros(self.num_tokens).index_copy_(0, self.rows, per_row)


def needs_gradients(hidden: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)


def hidden_gradient(entered: Tensor, plan: ChunkPlan) -> HiddenGradient:
    return HiddenGradient(entered, plan.shard, plan.hidden_grad, plan.rows, plan.num_tokens)


def plan_chunks(
    caller: str,
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    temperature: float,
    valid_vocab: int | None,
    group: dist.ProcessGroup | None,
    rows: Tensor | None,
    hidden_grad: HiddenGrad,
    chunk_tokens: int,
    logits_dtype: torch.dtype | None,
) -> ChunkPlan:
    """Host-side numbers only. Raises ValueError for arguments that do not fit."""
    checks.check_matrix(caller, "hidden", hidden, "T, H")
    checks.check_matrix(caller, "weight", weight, "V_local, H")
    checks.check_contiguous(caller, "hidden", hidden)
    checks.check_contiguous(caller, "weight", weight)
    checks.check_pair(caller, hidden, weight)
    checks.check_temperature(caller, temperature)
    checks.check_choice(caller, "hidden_grad", hidden_grad, get_args(HiddenGrad))
    if chunk_tokens < 1:
        raise ValueError(f"{caller}: chunk_tokens is {chunk_tokens}, expected at least 1.")
    shard = VocabShard.of(caller, weight.shape[0], valid_vocab, group)
    is_scattered = hidden_grad == "reduce_scatter"
    num_tokens = len(hidden) * (shard.num_ranks if is_scattered else 1)
    vocab = shard.num_ranks * shard.num_columns if valid_vocab is None else valid_vocab
    checks.check_token_ids(caller, token_ids, num_tokens, hidden.device, vocab)
    checks.check_selection(caller, "rows", rows, num_tokens, hidden.device)
    default = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    checks.check_choice(caller, "logits_dtype", logits_dtype, (None, default, hidden.dtype))
    return ChunkPlan(
        shard=shard,
        inverse_temperature=1.0 / temperature,
        num_tokens=num_tokens,
        rows=rows,
        hidden_grad=hidden_grad,
        chunk_tokens=chunk_tokens,
        logits_dtype=logits_dtype or default,
    )
