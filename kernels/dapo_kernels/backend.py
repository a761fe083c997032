"""The one dispatch rule: who does the work on rows of logits and on tokens.

Everything else, chunks and GEMMs, collectives, main_grad and autograd, exists once and is the same
for both.
"""

from __future__ import annotations

import os
from typing import Protocol

import torch
from torch import Tensor

from dapo_kernels import reference
from dapo_kernels.terms import ClipRule, PolicyTokens, RowResults, TokenLosses
from dapo_kernels.vocab import VocabShard


class RowOperations(Protocol):
    """Two modules have them: `triton_ops`, and `reference` in obvious torch.

    Letters: C rows, V_local columns, S parts a row is split into, R ranks.
    """

    def num_splits(self, num_rows: int, num_columns: int) -> int:
        """S: parts of a row that are worked on at once; more than 1 only for few rows."""

    def write_statistics(
        self,
        out: Tensor,
        logits: Tensor,
        token_ids: Tensor,
        shard: VocabShard,
        inverse_temperature: float,
        keep: Tensor | None = None,
    ) -> None:
        """Fill out [S, C, 4], a row's parts apart: largest logit m, sum of e = exp((x - m) / T),
        sum of e (x - m), and the logit of token_ids, -inf where it is not in this part. In units
        of the module's own, which its `combine` knows.

        Args:
            out: [S, C, 4] float32 (float64); last dimension contiguous.
            logits: [C, V_local] bfloat16, float32 (float64); rows contiguous.
            token_ids: [C] int64 in the whole vocabulary.
            shard: of the columns.
            inverse_temperature: 1 / T.
            keep: [C] bool; rows where it is False are not read, and stand for certainty.
        """

    def combine(self, statistics: Tensor, inverse_temperature: float) -> RowResults:
        """[R * S, C, 4] -> log-prob, entropy and normalizer of each row."""

    def write_gradient(
        self,
        logits: Tensor,
        token_ids: Tensor,
        shard: VocabShard,
        inverse_temperature: float,
        results: RowResults,
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
        dtype: torch.dtype,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Overwrite logits by the gradient, and return it as [C, V_local] of `dtype`.

        For float32 logits and dtype bfloat16 it lies in the first half of each row, rows as far
        apart as they were. Exactly 0 in padding columns, and in rows without upstream gradient,
        of log-prob -inf, or not kept, which are not read.
        """

    def token_losses(self, logprobs: Tensor, tokens: PolicyTokens, rule: ClipRule) -> TokenLosses:
        """Loss, its slope and the statistics; see `dapo_loss`. T is at least 1."""


def operations(tensor: Tensor) -> RowOperations:
    """Triton on a GPU, and anywhere under its interpreter (TRITON_INTERPRET=1); else torch.

    float64, which is for checking, is always torch's.
    """
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if tensor.dtype == torch.float64 or not (tensor.is_cuda or is_interpreted):
        return reference
    from dapo_kernels import triton_ops

    return triton_ops
