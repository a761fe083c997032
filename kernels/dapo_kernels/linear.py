"""Token log-probs and entropy from hidden states: `linear_logprob`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dapo_kernels.backend import operations
from dapo_kernels.chunks import (
    CHUNK_TOKENS,
    ChunkPlan,
    HiddenGrad,
    hidden_gradient,
    needs_gradients,
    plan_chunks,
)
from dapo_kernels.gradients import WeightGradient, multiply
from dapo_kernels.logits import combine, new_statistics
from dapo_kernels.terms import RowResults


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    group: dist.ProcessGroup | None = None,
    rows: Tensor | None = None,
    hidden_grad: HiddenGrad = "all_reduce",
    chunk_tokens: int = CHUNK_TOKENS,
    logits_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each given token, and entropy, under softmax(hidden weight^T / temperature).

    For any loss that comes after it: the backward recomputes the logits (8 T H V operations in
    all). Where the loss is DAPO's, `linear_dapo_loss` needs 6. Without gradients, it scores. One
    all-gather of 16 bytes a token forward; the same call with and without gradients gives the same
    bits, and the same as in `linear_dapo_loss`, so the ratio before the first update is exactly 1.

    Gradient of weight: where `weight.main_grad` exists (Megatron's DDP) it is added there in
    float32, `weight.grad_added_to_main_grad` becomes True and the returned gradient is zeros; zeros
    because with tied embeddings Megatron's hook adds it once more. Else an ordinary gradient.

    Args:
        hidden: [T, H] bfloat16 or float32, contiguous, alike on all ranks (but see hidden_grad).
        weight: [V_local, H], same dtype, contiguous; this rank's rows: rank * V_local on.
        token_ids: [T] int64 in [0, valid_vocab). On a GPU an id outside gives log-prob -inf and no
            gradient; `checked_values` finds it.
        temperature: positive; acts on float32 logits.
        valid_vocab: real vocabulary; rows of the weight from there on are padding. None: none is.
        group: the vocab-parallel ranks; None for one.
        rows: [K] int64, distinct: only these tokens take part and cost time; the others give
            log-prob 0, entropy 0 and gradient 0. None: all.
        hidden_grad: who sums the gradient of hidden over the group. "all_reduce": this function.
            "partial": the caller, who gets this rank's part of the sum. "reduce_scatter": hidden is
            this rank's [T / R, H] part under sequence parallelism; this function gathers it, and
            its gradient is complete.
        chunk_tokens: C; at most [C, V_local] logits exist at a time.
        logits_dtype: of the logits of a chunk; None is float32. torch.bfloat16 halves their memory
            at the price of log-probs rounded by up to 2^-8 of the largest logit.

    Returns:
        logprobs [T] float32, nats, at most 0; entropy [T] float32, nats. Both carry gradients.

    Raises:
        ValueError: shape, dtype, layout or shard does not fit; nothing was communicated.
    """
    plan = plan_chunks(
        "linear_logprob",
        hidden,
        weight,
        token_ids,
        temperature=temperature,
        valid_vocab=valid_vocab,
        group=group,
        rows=rows,
        hidden_grad=hidden_grad,
        chunk_tokens=chunk_tokens,
        logits_dtype=logits_dtype,
    )
    if not needs_gradients(hidden, weight):
        results = score(plan.enter(hidden), weight, plan.select(token_ids), plan)
        return plan.spread(results.logprobs), plan.spread(results.entropy)
    # The stubs of torch leave `apply` without types.
    return _LinearLogprob.apply(  # type: ignore[no-untyped-call, no-any-return]
        hidden, weight, token_ids, plan
    )


def score(hidden: Tensor, weight: Tensor, token_ids: Tensor, plan: ChunkPlan) -> RowResults:
    """Of the K rows that take part, by one all-gather."""
    chunks = plan.chunks(len(hidden))
    if not chunks:
        return combine(new_statistics(hidden, 1, 0), plan.inverse_temperature)
    logits = plan.new_logits(hidden, chunks)
    rows = operations(logits)
    num_splits = rows.num_splits(len(logits), plan.shard.num_columns)
    statistics = new_statistics(logits, num_splits, len(hidden))
    for chunk in chunks:
        logits_C = logits[: chunk.stop - chunk.start]
        multiply(logits_C, hidden[chunk], weight.t())
        rows.write_statistics(
            statistics[:, chunk], logits_C, token_ids[chunk], plan.shard, plan.inverse_temperature
        )
    everyone, work = plan.shard.gather(statistics)
    if work is not None:
        work.wait()
    return combine(everyone, plan.inverse_temperature)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, token_ids: Tensor, plan: ChunkPlan
    ) -> tuple[Tensor, Tensor]:
        entered, token_ids = plan.enter(hidden), plan.select(token_ids)
        results = score(entered, weight, token_ids, plan)
        ctx.save_for_backward(
            entered, weight, token_ids, results.logprobs, results.entropy, results.normalizer
        )
        # Not among the saved tensors: it changes in place between forward and backward.
        ctx.main_grad = getattr(weight, "main_grad", None)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return plan.spread(results.logprobs), plan.spread(results.entropy)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, token_ids, *parts = ctx.saved_tensors
        results, plan = RowResults(*parts), ctx.plan
        of_logprobs = (
            torch.zeros_like(results.logprobs)
            if grad_logprobs is None
            else plan.select(grad_logprobs).contiguous()
        )
        of_entropy = None if grad_entropy is None else plan.select(grad_entropy).contiguous()
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        of_hidden = hidden_gradient(hidden, plan) if needs_hidden else None
        of_weight = WeightGradient(weight, ctx.main_grad) if needs_weight else None
        chunks = plan.chunks(len(hidden))
        logits = plan.new_logits(hidden, chunks) if chunks else hidden
        for chunk in chunks:
            logits_C = logits[: chunk.stop - chunk.start]
            multiply(logits_C, hidden[chunk], weight.t())
            gradient = operations(logits_C).write_gradient(
                logits_C,
                token_ids[chunk],
                plan.shard,
                plan.inverse_temperature,
                results.take(chunk),
                of_logprobs[chunk],
                None if of_entropy is None else of_entropy[chunk],
                hidden.dtype,
            )
            if of_hidden is not None:
                of_hidden.write(chunk, gradient, weight)
            if of_weight is not None:
                of_weight.add(gradient, hidden[chunk])
        grad_hidden = None if of_hidden is None else of_hidden.finish()
        grad_weight = None if of_weight is None else of_weight.finish()
        return grad_hidden, grad_weight, None, None
