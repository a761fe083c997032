"""The DAPO loss from hidden states, gradients formed in the forward: `linear_dapo_loss`.

The logits exist chunk by chunk only, and every chunk goes the same way:

    hidden, weight --GEMM--> logits --write_statistics, gather, combine--> log-probs
    log-probs --token_losses--> slope --write_gradient--> d loss / d logits, over the logits
    d loss / d logits --two GEMMs--> gradient of hidden, and += gradient of weight
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dapo_kernels import checks
from dapo_kernels.backend import operations
from dapo_kernels.chunks import (
    CHUNK_TOKENS,
    ChunkPlan,
    HiddenGrad,
    hidden_gradient,
    needs_gradients,
    plan_chunks,
)
from dapo_kernels.gradients import HiddenGradient, WeightGradient, multiply
from dapo_kernels.logits import combine, new_statistics
from dapo_kernels.loss import clip_rule, token_losses
from dapo_kernels.terms import ClipRule, DapoLossStats, PolicyTokens, add_up, empty_losses


def linear_dapo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
    importance_cap: float = 2.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    group: dist.ProcessGroup | None = None,
    rows: Tensor | None = None,
    hidden_grad: HiddenGrad = "all_reduce",
    chunk_tokens: int = CHUNK_TOKENS,
    logits_dtype: torch.dtype | None = None,
) -> tuple[Tensor, DapoLossStats]:
    """`dapo_loss` of `linear_logprob`, gradients formed in the forward: 6 T H V operations.

    All that the gradient needs is known before the output layer, so a chunk's logits become its
    loss and its gradients at once and are never computed again. The backward only hands the
    gradient of hidden over, multiplied by the upstream gradient.

    Gradient of weight: where `weight.main_grad` exists it is added there in float32 *by the
    forward*, so the upstream gradient must be 1: put every factor into token_weights. Another one
    raises ValueError on a CPU, and gives a gradient of NaN on a GPU, where looking would wait for
    the device. What backward returns for weight is zeros, as in `linear_logprob`.

    Under `group`: one all-gather of 16 bytes a token for each chunk, while the GEMM of the next
    chunk runs; the gradient of hidden is summed chunk by chunk while the weight's is formed.

    Args:
        hidden: [T, H], as in `linear_logprob`.
        weight: [V_local, H], as in `linear_logprob`.
        token_ids: [T] int64, as in `linear_logprob`.
        old_logprobs: [T] float32 or None, as in `dapo_loss`.
        rollout_logprobs: [T] float32 or None, as in `dapo_loss`.
        advantages: [T] float32, as in `dapo_loss`.
        token_weights: [T] float32, as in `dapo_loss`; 0 at tokens that are not in rows.
        clip_low: epsilon_low, positive.
        clip_high: epsilon_high, positive.
        dual_clip: as in `dapo_loss`; 0 turns it off.
        importance_cap: largest importance weight.
        ref_logprobs: [T] float32 or None, as in `dapo_loss`.
        kl_coef: weight of the KL to the reference policy.
        temperature: as in `linear_logprob`; so are the following.
        valid_vocab: real vocabulary.
        group: the vocab-parallel ranks.
        rows: tokens that take part; best those whose weight is not 0.
        hidden_grad: who sums the gradient of hidden over the group.
        chunk_tokens: C.
        logits_dtype: of the logits of a chunk.

    Returns:
        The loss, a float32 scalar alike on all ranks, and statistics, entropy included.

    Raises:
        ValueError: as in `linear_logprob` and `dapo_loss`.
        RuntimeError: a second backward.
    """
    caller = "linear_dapo_loss"
    rule = clip_rule(
        caller,
        ref_logprobs,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        importance_cap=importance_cap,
        kl_coef=kl_coef,
    )
    plan = plan_chunks(
        caller,
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
    tokens = PolicyTokens(
        old_logprobs=old_logprobs,
        rollout_logprobs=rollout_logprobs,
        advantages=advantages,
        token_weights=token_weights,
        ref_logprobs=ref_logprobs,
        entropy=None,
    )
    per_token = {"token_weights": token_weights, **tokens.given()}
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    checks.check_per_token(caller, per_token, dtype)
    checks.check_length(caller, token_weights, plan.num_tokens)
    if rows is not None:
        tokens = tokens.take(rows)
    if not needs_gradients(hidden, weight):
        entered, token_ids = plan.enter(hidden), plan.select(token_ids)
        loss, figures = _loss_and_gradients(entered, weight, token_ids, tokens, rule, plan)
        return loss, DapoLossStats.of(figures)
    loss, figures = _LinearDapoLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, token_ids, tokens, rule, plan
    )
    return loss, DapoLossStats.of(figures)


@dataclass(slots=True)
class _Chunk:
    """A chunk whose statistics are on their way between the ranks."""

    place: slice
    logits: Tensor
    statistics: Tensor
    work: dist.Work | None


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    tokens: PolicyTokens,
    rule: ClipRule,
    plan: ChunkPlan,
    of_hidden: HiddenGradient | None = None,
    of_weight: WeightGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and figures of the K rows; their gradients go where one is wanted."""
    chunks = plan.chunks(len(hidden))
    if not chunks:
        nothing = empty_losses(new_statistics(hidden, 1, 0).view(-1))
        return nothing.loss, nothing.figures
    # With ranks to wait for, the next chunk's GEMM runs meanwhile, on logits of its own.
    depth = 1 if plan.shard.group is None else min(2, len(chunks))
    buffers = [plan.new_logits(hidden, chunks) for _ in range(depth)]
    rows = operations(buffers[0])
    num_splits = rows.num_splits(len(buffers[0]), plan.shard.num_columns)

    def start(number: int) -> _Chunk:
        place = chunks[number]
        logits = buffers[number % depth][: place.stop - place.start]
        multiply(logits, hidden[place], weight.t())
        statistics = new_statistics(logits, num_splits, len(logits))
        rows.write_statistics(
            statistics, logits, token_ids[place], plan.shard, plan.inverse_temperature
        )
        return _Chunk(place, logits, *plan.shard.gather(statistics))

    def finish(chunk: _Chunk) -> tuple[Tensor, Tensor]:
        if chunk.work is not None:
            chunk.work.wait()
        results = combine(chunk.statistics, plan.inverse_temperature)
        losses = token_losses(
            results.logprobs, tokens.take(chunk.place).with_entropy(results.entropy), rule
        )
        if of_hidden is not None or of_weight is not None:
            gradient = rows.write_gradient(
                chunk.logits,
                token_ids[chunk.place],
                plan.shard,
                plan.inverse_temperature,
                results,
                losses.slope,
                None,
                hidden.dtype,
            )
            if of_hidden is not None:
                of_hidden.write(chunk.place, gradient, weight)
            if of_weight is not None:
                of_weight.add(gradient, hidden[chunk.place])
        return losses.loss, losses.figures

    parts: list[tuple[Tensor, Tensor]] = []
    under_way: deque[_Chunk] = deque()
    for number in range(len(chunks)):
        under_way.append(start(number))
        if len(under_way) == depth:
            parts.append(finish(under_way.popleft()))
    parts.extend(finish(chunk) for chunk in under_way)
    if len(parts) == 1:
        return parts[0]
    losses, figures = zip(*parts, strict=True)
    return torch.stack(losses).sum(), add_up(torch.stack(figures))


class _LinearDapoLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        tokens: PolicyTokens,
        rule: ClipRule,
        plan: ChunkPlan,
    ) -> tuple[Tensor, Tensor]:
        entered, token_ids = plan.enter(hidden), plan.select(token_ids)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        main_grad = getattr(weight, "main_grad", None)
        of_hidden = hidden_gradient(entered, plan) if needs_hidden else None
        of_weight = WeightGradient(weight, main_grad) if needs_weight else None
        loss, figures = _loss_and_gradients(
            entered, weight, token_ids, tokens, rule, plan, of_hidden, of_weight
        )
        ctx.grad_hidden = None if of_hidden is None else of_hidden.finish()
        ctx.of_weight = of_weight
        ctx.mark_non_differentiable(figures)
        return loss, figures

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, of_weight = ctx.grad_hidden, ctx.of_weight
        if grad_hidden is None and of_weight is None:
            raise RuntimeError(
                "linear_dapo_loss: a second backward, but the gradients were formed once, in the "
                "forward, and handed over. Call the function again, or use linear_logprob."
            )
        ctx.grad_hidden = ctx.of_weight = None
        if of_weight is not None:
            grad_loss = of_weight.require_one(grad_loss, nobody_else=grad_hidden is None)
        if grad_hidden is not None:
            grad_hidden.mul_(grad_loss)
        grad_weight = None if of_weight is None else of_weight.finish(grad_loss)
        return grad_hidden, grad_weight, None, None, None, None
