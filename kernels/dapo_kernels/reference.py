"""The row operations in obvious torch: the CPU path, and what the Triton kernels are held to.

Signatures and meaning: `backend.RowOperations`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dapo_kernels.terms import (
    MAX_LOGRATIO,
    NUM_SLOTS,
    STATISTICS,
    ClipRule,
    PolicyTokens,
    RowResults,
    TokenLosses,
)
from dapo_kernels.vocab import VocabShard

_FLOOR = -1e4
"""Exponents below this are raised to it: exp gives 0 all the same, and 0 * it is not NaN."""


def num_splits(num_rows: int, num_columns: int) -> int:  # noqa: ARG001  # the protocol's names
    return 1


def write_statistics(
    out: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    shard: VocabShard,
    inverse_temperature: float,
    keep: Tensor | None = None,
) -> None:
    out[0] = out.new_tensor([-torch.inf, 0.0, 0.0, -torch.inf])
    if shard.num_valid:
        valid = logits[:, : shard.num_valid].to(out.dtype)
        column, is_here = _local_column(token_ids, shard)
        target = valid.gather(1, column).squeeze(1)
        # A row of -inf only keeps a finite maximum, so that -inf - maximum is not NaN.
        maximum = valid.amax(1).clamp_min(torch.finfo(out.dtype).min)
        below = (valid - maximum[:, None]).clamp_min_(_FLOOR / inverse_temperature)
        exponentials = (below * inverse_temperature).exp_()
        out[0, :, 0] = maximum
        out[0, :, 1] = exponentials.sum(1)
        out[0, :, 2] = exponentials.mul_(below).sum(1)
        out[0, :, 3] = target.masked_fill(~is_here, -torch.inf)
    if keep is not None:
        # Together the ranks stand for certainty, log-prob 0 and entropy 0; the first says so.
        certain, nothing = [0.0, 1.0, 0.0, 0.0], [-torch.inf, 0.0, 0.0, -torch.inf]
        out[0, ~keep] = out.new_tensor(certain if shard.start == 0 else nothing)


def combine(statistics: Tensor, inverse_temperature: float) -> RowResults:
    maxima, sums, weighted, targets = statistics.unbind(-1)
    maximum = maxima.amax(0)
    offsets = (maxima - maximum).clamp_min(_FLOOR / inverse_temperature)
    scales = (offsets * inverse_temperature).exp()
    # At least 1, the maximum's own term, unless every logit of the row is -inf. So the log-prob is
    # never above 0 and the entropy never below it.
    total = (sums * scales).sum(0).clamp_min(1.0)
    mean_below = ((weighted + offsets * sums) * scales).sum(0) / total
    log_total = total.log()
    return RowResults(
        logprobs=(targets.amax(0) - maximum) * inverse_temperature - log_total,
        entropy=log_total - mean_below * inverse_temperature,
        normalizer=torch.stack((maximum, log_total), dim=-1),
    )


def write_gradient(
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
    valid = logits[:, : shard.num_valid].to(results.logprobs.dtype)
    maximum, log_total = results.normalizer[:, :1], results.normalizer[:, 1:]
    logprobs = (valid - maximum).mul_(inverse_temperature).sub_(log_total)
    is_impossible = torch.isneginf(results.logprobs)
    upstream = grad_logprobs.masked_fill(is_impossible, 0.0)[:, None] * inverse_temperature
    is_idle = upstream == 0
    picked = results.logprobs[:, None]
    # 1 - p from the log-prob: p of a confident token, rounded, would leave nothing of it.
    own = -upstream * torch.expm1(picked)
    if grad_entropy is None:
        gradient = logprobs.exp_().mul_(-upstream)
    else:
        of_entropy = grad_entropy[:, None] * inverse_temperature
        entropy = results.entropy[:, None]
        gradient = -upstream * logprobs.exp() - of_entropy * _entropy_slope(logprobs, entropy)
        own = own - of_entropy * _entropy_slope(picked, entropy)
        is_idle &= of_entropy == 0
    if shard.num_valid:
        column, is_here = _local_column(token_ids, shard)
        own = torch.where((is_here & ~is_impossible)[:, None], own, gradient.gather(1, column))
        gradient.scatter_(1, column, own)
    if keep is not None:
        is_idle |= ~keep[:, None]
    out = logits if logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    out[:, : shard.num_valid] = gradient.masked_fill_(is_idle, 0.0)
    out[:, shard.num_valid :] = 0.0
    return out


def token_losses(logprobs: Tensor, tokens: PolicyTokens, rule: ClipRule) -> TokenLosses:
    """Autograd gives the slope: the one place where it does not come from a formula of ours."""
    counts = (tokens.token_weights != 0) & ~torch.isneginf(logprobs)

    def trained(values: Tensor | None, otherwise: float | Tensor) -> Tensor:
        return torch.where(counts, otherwise if values is None else values, 0.0)

    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        current = torch.where(counts, leaf, 0.0)
        old = trained(tokens.old_logprobs, current.detach())
        advantages = trained(tokens.advantages, 0.0)
        logratio = _bounded(current - old)
        ratio = logratio.exp()
        losses = _clip_higher(ratio, advantages, rule)
        importance = _bounded(old - trained(tokens.rollout_logprobs, old)).exp()
        if tokens.rollout_logprobs is not None:
            importance = importance.clamp_max(rule.importance_cap)
        losses = losses * importance
        difference = _bounded(trained(tokens.ref_logprobs, current.detach()) - current)
        kl = torch.expm1(difference) - difference
        if tokens.ref_logprobs is not None:
            losses = losses + rule.kl_coef * kl
        loss = (tokens.token_weights * losses).sum()
        (slope,) = torch.autograd.grad(loss, leaf)
    is_bad, is_good = advantages < 0, advantages > 0
    has_rollout = tokens.rollout_logprobs is not None
    figures = {
        "tokens": tokens.token_weights != 0,
        "clipped_high": is_good & (ratio > 1 + rule.clip_high),
        "clipped_low": is_bad & (ratio < 1 - rule.clip_low),
        "dual_clipped": is_bad & (ratio > rule.dual_clip) & bool(rule.dual_clip),
        "impossible": (tokens.token_weights != 0) & ~counts,
        "logratio_sum": logratio,
        "logratio_squared_sum": logratio.square(),
        "ratio_sum": trained(ratio, 0.0),
        "importance_sum": trained(importance, 0.0),
        "importance_capped": counts & (importance >= rule.importance_cap) & has_rollout,
        "kl_sum": kl,
        "entropy_sum": trained(tokens.entropy, 0.0),
    }
    sums = [figures[name].sum(dtype=torch.float32) for name in STATISTICS[:-1]]
    vector = torch.zeros(NUM_SLOTS, dtype=torch.float32, device=logprobs.device)
    vector[: len(sums) + 2] = torch.stack(
        [loss.float(), *sums, (ratio - 1).abs().amax().float()]
    ).detach()
    return TokenLosses(loss.detach(), slope, vector)


def _entropy_slope(logprobs: Tensor, entropy: Tensor) -> Tensor:
    """-d entropy / d logit of each token, at temperature 1: p (log p + entropy)."""
    return logprobs.exp() * (logprobs.clamp_min(_FLOOR) + entropy)


def _clip_higher(ratio: Tensor, advantages: Tensor, rule: ClipRule) -> Tensor:
    clipped = ratio.clamp(1.0 - rule.clip_low, 1.0 + rule.clip_high)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped)
    if not rule.dual_clip:
        return losses
    bound = torch.minimum(losses, -rule.dual_clip * advantages)
    return torch.where(advantages < 0, bound, losses)


def _bounded(logratio: Tensor) -> Tensor:
    """Clamped to +-20; not by torch.clamp, whose gradient hides NaN."""
    below = torch.where(logratio > MAX_LOGRATIO, MAX_LOGRATIO, logratio)
    return torch.where(below < -MAX_LOGRATIO, -MAX_LOGRATIO, below)


def _local_column(token_ids: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """[C, 1] column of each token, any column where it is not here; and [C] whether it is."""
    column = token_ids - shard.start
    is_here = (column >= 0) & (column < shard.num_valid)
    return column.clamp(0, max(shard.num_valid - 1, 0))[:, None], is_here
