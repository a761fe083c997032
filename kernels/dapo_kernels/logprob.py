"""Token log-probs and entropy straight from hidden states; the logits exist chunk by chunk only.

Letters: T tokens, H hidden size, V_local rows of the output weight on this rank, C tokens of one
chunk, R ranks of the vocab-parallel group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_FLOOR = -1e4
"""Shifted logits below this are raised to it: exp gives 0 all the same, and 0 * it is not NaN."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What holds for all chunks of one call."""

    inverse_temperature: float
    vocab_start: int
    num_valid: int
    """Rows of the local weight that are real vocabulary; those after them are padding."""
    group: dist.ProcessGroup | None
    """None as well for a group of one rank."""
    chunk_tokens: int
    dtype: torch.dtype
    """Of logits and statistics: float32, or float64 for float64 inputs."""

    def chunks(self, num_tokens: int) -> list[slice]:
        starts = range(0, num_tokens, self.chunk_tokens)
        return [slice(start, min(start + self.chunk_tokens, num_tokens)) for start in starts]


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    temperature: float,
    vocab_start: int,
    valid_vocab: int,
    group: dist.ProcessGroup | None,
    chunk_tokens: int = 2048,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each given token, and entropy, under softmax(hidden weight^T / temperature).

    Logits, statistics and their gradient are float32 (float64 for float64 inputs) whatever the
    dtype of the inputs. One all-gather of [T, 4] statistics per forward; backward recomputes the
    logits and needs no statistics again. The same call with and without gradient gives the same
    bits, so the ratio before the first update is exactly 1.

    Tensor parallelism: every rank of `group` passes the same hidden, token_ids and its own rows of
    the weight. The gradient of hidden is already summed over the group: under sequence parallelism
    gather hidden first with an operator whose backward splits and does not reduce again
    (Megatron: gather_from_sequence_parallel_region(..., tensor_parallel_output_grad=False)).

    Weight gradient: where `weight.main_grad` exists (Megatron's DDP) it is added there in float32,
    `weight.grad_added_to_main_grad` becomes True and the returned gradient is zeros; zeros
    because with tied embeddings Megatron's hook adds it once more. Else an ordinary gradient.

    Args:
        hidden: [T, H] float, contiguous. T may be 0.
        weight: [V_local, H], same dtype, contiguous; this rank's rows, V_local alike on all ranks.
        token_ids: [T] int64; an id outside [0, valid_vocab) gets log-prob -inf and no gradient.
        temperature: positive; logits are multiplied by its inverse in float32.
        vocab_start: first row of this rank in the whole vocabulary, rank * V_local.
        valid_vocab: real vocabulary; rows from there on are padding and take no part.
        group: the vocab-parallel ranks; None for one.
        chunk_tokens: C; at most [C, V_local] logits exist at a time.

    Returns:
        logprobs [T], nats, at most 0, with gradient; entropy [T], nats, without.

    Raises:
        ValueError: shape, dtype, layout or shard does not fit; nothing was communicated.
    """
    _check_tensors(hidden, weight, token_ids)
    plan = _plan(hidden, weight, temperature, vocab_start, valid_vocab, group, chunk_tokens)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        # The stubs of torch leave `apply` without types.
        logprobs, entropy = _LinearLogprob.apply(  # type: ignore[no-untyped-call]
            hidden, weight, token_ids, plan
        )
    else:
        logprobs, entropy, _ = _forward(hidden, weight, token_ids, plan)
    return logprobs, entropy


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, token_ids: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy, normalizer = _forward(hidden, weight, token_ids, plan)
        ctx.save_for_backward(hidden, weight, token_ids, logprobs, normalizer)
        # Not among the saved tensors: it changes in place between forward and backward.
        ctx.main_grad = getattr(weight, "main_grad", None)
        ctx.plan = plan
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, token_ids, logprobs, normalizer = ctx.saved_tensors
        plan: _Plan = ctx.plan
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        total = _weight_total(weight, ctx.main_grad, plan.dtype) if needs_weight else None
        rows = weight[: plan.num_valid].to(plan.dtype)
        for chunk in plan.chunks(len(token_ids)):
            hidden_C = hidden[chunk].to(plan.dtype)
            grad_logits = _grad_logits(
                hidden_C,
                rows,
                token_ids[chunk] - plan.vocab_start,
                logprobs[chunk],
                normalizer[chunk],
                grad_logprobs[chunk],
                plan,
            )
            if grad_hidden is not None:
                grad_hidden[chunk] = grad_logits @ rows
            if total is not None:
                total[: plan.num_valid].addmm_(grad_logits.t(), hidden_C)
        if grad_hidden is not None and plan.group is not None and len(token_ids):
            dist.all_reduce(grad_hidden, group=plan.group)
        return grad_hidden, _weight_gradient(weight, ctx.main_grad, total), None, None


def _forward(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, plan: _Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [T], entropy [T], and the normalizer [T, 2]: maximum and log of the sum of
    exp(logit - maximum). Two numbers, because their sum would round away small log-probs."""
    local = hidden.new_empty((len(token_ids), 4), dtype=plan.dtype)
    rows = weight[: plan.num_valid].to(plan.dtype)
    for chunk in plan.chunks(len(token_ids)):
        hidden_C = hidden[chunk].to(plan.dtype)
        _write_statistics(local[chunk], hidden_C, rows, token_ids[chunk] - plan.vocab_start, plan)
    return _combine(_gather(local, plan.group))


def _write_statistics(
    out: Tensor, hidden_C: Tensor, rows: Tensor, local_ids: Tensor, plan: _Plan
) -> None:
    """Per token: maximum m of the local logits z, sum e^(z-m), sum e^(z-m) (z-m), z of the token.

    The last is -inf where another rank holds the token's row.
    """
    if plan.num_valid == 0:
        out.copy_(out.new_tensor([-torch.inf, 0.0, 0.0, -torch.inf]).expand_as(out))
        return
    logits = _logits(hidden_C, rows, plan)
    target = logits.gather(1, local_ids.clamp(0, plan.num_valid - 1)[:, None]).squeeze(1)
    out[:, 3] = target.masked_fill_(~_is_local(local_ids, plan), -torch.inf)
    # A row of -inf only keeps a finite maximum, so that -inf - maximum is not NaN.
    maximum = logits.amax(1, keepdim=True).clamp_min_(torch.finfo(plan.dtype).min)
    shifted = logits.sub_(maximum).clamp_min_(_FLOOR)
    exponentials = shifted.exp()
    out[:, 0] = maximum.squeeze(1)
    out[:, 1] = exponentials.sum(1)
    out[:, 2] = exponentials.mul_(shifted).sum(1)


def _gather(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[R, T, 4] statistics of all ranks, by the forward's only collective."""
    if group is None or local.numel() == 0:
        return local[None]
    everyone = local.new_empty((group.size() * local.shape[0], 4))
    dist.all_gather_into_tensor(everyone, local, group=group)
    return everyone.view(group.size(), *local.shape)


def _combine(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    maxima, sums, weighted, targets = statistics.unbind(-1)
    maximum = maxima.amax(0)
    offsets = (maxima - maximum).clamp_min_(_FLOOR)
    scales = offsets.exp()
    # At least 1, the maximum's own term, unless every logit of the row is -inf. So the log-prob is
    # never above 0 and the entropy never below it.
    total = (sums * scales).sum(0).clamp_min_(1.0)
    mean_shifted = ((weighted + offsets * sums) * scales).sum(0) / total
    log_total = total.log()
    logprobs = targets.amax(0) - maximum - log_total
    return logprobs, log_total - mean_shifted, torch.stack((maximum, log_total), dim=-1)


def _grad_logits(
    hidden_C: Tensor,
    rows: Tensor,
    local_ids: Tensor,
    logprobs: Tensor,
    normalizer: Tensor,
    grad_logprobs: Tensor,
    plan: _Plan,
) -> Tensor:
    """[C, valid rows]: (1[token] - p) * grad / temperature; 0 for tokens without gradient."""
    upstream = (grad_logprobs.to(plan.dtype) * plan.inverse_temperature)[:, None]
    probabilities = _logits(hidden_C, rows, plan).sub_(normalizer[:, :1]).sub_(normalizer[:, 1:])
    grad = probabilities.exp_().mul_(-upstream)
    if plan.num_valid:
        # 1 - p from the log-prob: p of a confident token, rounded, would leave nothing of it.
        columns = local_ids.clamp(0, plan.num_valid - 1)[:, None]
        own = torch.expm1(logprobs)[:, None].mul_(-upstream)
        is_local = _is_local(local_ids, plan)[:, None]
        grad.scatter_(1, columns, torch.where(is_local, own, grad.gather(1, columns)))
    is_idle = (upstream == 0) | torch.isneginf(logprobs)[:, None]
    return grad.masked_fill_(is_idle, 0.0)


def _logits(hidden_C: Tensor, rows: Tensor, plan: _Plan) -> Tensor:
    return torch.mm(hidden_C, rows.t()).mul_(plan.inverse_temperature)


def _is_local(local_ids: Tensor, plan: _Plan) -> Tensor:
    return (local_ids >= 0) & (local_ids < plan.num_valid)


def _weight_total(weight: Tensor, main_grad: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Where the weight gradient of all chunks is summed: main_grad itself, or zeros."""
    if main_grad is None:
        return torch.zeros_like(weight, dtype=dtype)
    if main_grad.dtype != dtype:
        raise ValueError(
            f"weight.main_grad is {main_grad.dtype}; expected {dtype}, so that small gradients are "
            "not lost. Set grad_reduce_in_fp32 in Megatron's DistributedDataParallelConfig."
        )
    return main_grad


def _weight_gradient(
    weight: Tensor, main_grad: Tensor | None, total: Tensor | None
) -> Tensor | None:
    if total is None:
        return None
    if main_grad is None:
        return total.to(weight.dtype)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # Megatron's DDP reads it
    return torch.zeros_like(weight)


def _plan(
    hidden: Tensor,
    weight: Tensor,
    temperature: float,
    vocab_start: int,
    valid_vocab: int,
    group: dist.ProcessGroup | None,
    chunk_tokens: int,
) -> _Plan:
    """Host-side numbers only. Raises ValueError when the shard does not fit the group."""
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    rows = weight.shape[0]
    if vocab_start != rank * rows:
        raise ValueError(
            f"linear_logprob: vocab_start is {vocab_start} on rank {rank} of {size}, expected "
            f"rank * V_local = {rank * rows}; pad the vocabulary so that it divides by {size}."
        )
    if not 1 <= valid_vocab <= size * rows:
        raise ValueError(
            f"linear_logprob: valid_vocab is {valid_vocab}, expected 1 to {size * rows} "
            f"({size} ranks of {rows} rows)."
        )
    if not temperature > 0 or chunk_tokens < 1:
        raise ValueError(
            f"linear_logprob: temperature = {temperature} and chunk_tokens = {chunk_tokens} must "
            "both be positive."
        )
    return _Plan(
        inverse_temperature=1.0 / temperature,
        vocab_start=vocab_start,
        num_valid=min(max(valid_vocab - vocab_start, 0), rows),
        group=group if size > 1 else None,
        chunk_tokens=chunk_tokens,
        dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32,
    )


def _check_tensors(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dim() != 2 or not tensor.is_contiguous() or not tensor.is_floating_point():
            raise ValueError(
                f"linear_logprob: {name} must be a contiguous floating [rows, H]; got "
                f"{tensor.dtype} {list(tensor.shape)}, strides {tensor.stride()}. Call "
                ".contiguous() where the tensor is made."
            )
    if hidden.dtype != weight.dtype or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_logprob: hidden is {hidden.dtype} {list(hidden.shape)}, weight is "
            f"{weight.dtype} {list(weight.shape)}; dtype and last dimension must agree."
        )
    if token_ids.dtype != torch.int64 or token_ids.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_logprob: token_ids must be int64 [{hidden.shape[0]}], one for each row of "
            f"hidden; got {token_ids.dtype} {list(token_ids.shape)}."
        )
