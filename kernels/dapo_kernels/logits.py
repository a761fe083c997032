"""Token log-probs and entropy from logits: `logprob`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dapo_kernels import checks
from dapo_kernels.backend import operations
from dapo_kernels.terms import RowResults
from dapo_kernels.vocab import VocabShard


def logprob(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    group: dist.ProcessGroup | None = None,
    keep: Tensor | None = None,
    inplace_backward: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each given token, and entropy, under softmax(logits / temperature).

    The logits are read once forward, and read and written once backward. Inside all is float32
    (float64 for float64 logits); the temperature acts on float32 values. Under `group` there is one
    all-gather of 16 bytes a token forward, and no collective backward.

    Args:
        logits: [T, V_local] bfloat16 or float32, columns adjacent, rows any distance apart; T may
            be 0. This rank's columns of the vocabulary: rank * V_local on.
        token_ids: [T] int64 in [0, valid_vocab), alike on all ranks. On a GPU an id outside gives
            log-prob -inf without gradient; `checked_values` finds it.
        temperature: positive.
        valid_vocab: real vocabulary; columns from there on are padding. None: no padding.
        group: the vocab-parallel ranks; None for one.
        keep: [T] bool; rows where it is False are never read, and give log-prob 0, entropy 0 and
            gradient 0. None keeps all.
        inplace_backward: the gradient overwrites the logits, which saves their size in memory.
            Whoever else reads the logits after that finds gradients.

    Returns:
        logprobs [T] float32, nats, at most 0; entropy [T] float32, nats. Both carry gradients.

    Raises:
        ValueError: shape, dtype, layout or shard does not fit; nothing was communicated.
        RuntimeError: a second backward after one in place.
    """
    checks.check_matrix("logprob", "logits", logits, "T, V_local")
    checks.check_temperature("logprob", temperature)
    shard = VocabShard.of("logprob", logits.shape[1], valid_vocab, group)
    vocab = shard.num_ranks * shard.num_columns if valid_vocab is None else valid_vocab
    checks.check_token_ids("logprob", token_ids, len(logits), logits.device, vocab)
    checks.check_selection("logprob", "keep", keep, len(logits), logits.device)
    # The stubs of torch leave `apply` without types.
    logprobs, entropy, _ = _Logprob.apply(  # type: ignore[no-untyped-call]
        logits, token_ids, keep, shard, 1.0 / temperature, inplace_backward
    )
    return logprobs, entropy


class _Logprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        token_ids: Tensor,
        keep: Tensor | None,
        shard: VocabShard,
        inverse_temperature: float,
        inplace_backward: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = operations(logits)
        num_splits = rows.num_splits(len(logits), shard.num_columns)
        statistics = new_statistics(logits, num_splits, len(logits))
        if len(logits):
            rows.write_statistics(statistics, logits, token_ids, shard, inverse_temperature, keep)
        everyone, work = shard.gather(statistics)
        if work is not None:
            work.wait()
        results = combine(everyone, inverse_temperature)
        # Not among the saved tensors, whose values may not change: it is overwritten in place.
        ctx.logits = logits.detach()
        ctx.save_for_backward(
            token_ids, keep, results.logprobs, results.entropy, results.normalizer
        )
        ctx.shard, ctx.inverse_temperature = shard, inverse_temperature
        ctx.inplace_backward = inplace_backward
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(results.normalizer)
        return results.logprobs, results.entropy, results.normalizer

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        if ctx.logits is None:
            raise RuntimeError(
                "logprob: a second backward, but the first has overwritten the logits by their "
                "gradient. Pass inplace_backward=False to keep them."
            )
        token_ids, keep, logprobs, entropy, normalizer = ctx.saved_tensors
        logits = ctx.logits
        if ctx.inplace_backward:
            ctx.logits = None
        else:
            logits = logits.clone(memory_format=torch.contiguous_format)
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(logprobs)
        gradient = logits
        if len(logits):
            gradient = operations(logits).write_gradient(
                logits,
                token_ids,
                ctx.shard,
                ctx.inverse_temperature,
                RowResults(logprobs, entropy, normalizer),
                grad_logprobs,
                grad_entropy,
                logits.dtype,
                keep,
            )
        if ctx.inplace_backward:
            # Autograd does not see what a kernel writes: tell whoever saved the logits as well.
            torch.autograd.graph.increment_version(logits)
        return gradient, None, None, None, None, None


def new_statistics(logits: Tensor, num_splits: int, num_tokens: int) -> Tensor:
    """[S, T, 4], float32 or float64."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty((num_splits, num_tokens, 4), dtype=dtype)


def combine(statistics: Tensor, inverse_temperature: float) -> RowResults:
    """Of no row as well."""
    if not statistics.shape[1]:
        nothing = statistics.new_empty(0)
        return RowResults(nothing, nothing.clone(), statistics.new_empty((0, 2)))
    return operations(statistics).combine(statistics, inverse_temperature)
