"""The DAPO loss of the tokens of one micro-batch, and the figures one wants to see beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOGRATIO = 20.0
"""Log-ratios are clamped to +-20 nats, so that exp stays finite. Source: verl."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DapoLossStats:
    """Figures over the trained tokens (weight not 0): 0-d float32 tensors on the loss's device.

    Those of several micro-batches add up, except ratio_max_diff, of which the largest counts.
    """

    tokens: Tensor
    """Trained tokens."""
    clipped_high: Tensor
    """Tokens with A > 0 whose ratio is above 1 + clip_high: no gradient."""
    clipped_low: Tensor
    """Tokens with A < 0 whose ratio is below 1 - clip_low: no gradient."""
    dual_clipped: Tensor
    """Tokens with A < 0 whose ratio is above dual_clip: no gradient."""
    kl_sum: Tensor
    """Sum of the k3 estimates of KL(policy || reference), nats; 0 without reference."""
    ratio_max_diff: Tensor
    """Largest |ratio - 1|."""


def dapo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
    importance_weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
) -> tuple[Tensor, DapoLossStats]:
    """This micro-batch's share of the loss: micro-batches, ranks and packings simply add up.

    sum_t w_t * (iw_t * L_t + kl_coef * k3_t), with r_t = exp(logprobs_t - old_logprobs_t),
    L_t = max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high)); under dual clip, where
    A_t < 0, L_t = min(L_t, -A_t dual_clip); k3_t = exp(d_t) - d_t - 1, d_t = ref - logprobs.

    Source: DAPO, arXiv 2503.14476, Eq. 8; dual clip and the clamp of log-ratios from verl. The
    denominator lies in token_weights. Where a log-ratio is clamped there is no gradient.

    Args:
        logprobs: [T] float32, nats; current policy; carries the gradient.
        old_logprobs: [T] float32, nats; the learner's own, before the step's first update.
        advantages: [T] float32; constant within one response.
        token_weights: [T] float32; loss mask over denominator. Where it is 0 the token adds
            exactly 0 to loss and gradient, whatever the other inputs hold there.
        clip_low: epsilon_low, positive.
        clip_high: epsilon_high, positive.
        dual_clip: bound c of the loss -A c of a token with A < 0; 0 turns it off.
        importance_weights: [T] float32, no gradient; None means 1.
        ref_logprobs: [T] float32, nats, of the reference policy; None where there is none.
        kl_coef: weight of the KL to the reference policy.

    Returns:
        The loss, a scalar in the dtype of logprobs, and statistics; no host synchronisation.

    Raises:
        ValueError: shapes differ, or kl_coef without ref_logprobs.
    """
    _check_shapes(logprobs, old_logprobs, advantages, token_weights)
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef = {kl_coef} needs ref_logprobs, got None; pass them, or 0.")
    is_trained = token_weights != 0
    current = torch.where(is_trained, logprobs, 0.0)
    advantages = torch.where(is_trained, advantages, 0.0)
    ratio = _bounded_exp(current - torch.where(is_trained, old_logprobs, 0.0))
    losses = _clip_higher(ratio, advantages, clip_low, clip_high, dual_clip)
    if importance_weights is not None:
        _check_shapes(logprobs, importance_weights)
        losses = losses * torch.where(is_trained, importance_weights, 0.0)
    kl = None
    if ref_logprobs is not None:
        _check_shapes(logprobs, ref_logprobs)
        kl = _k3(torch.where(is_trained, ref_logprobs, 0.0) - current)
        losses = losses + kl_coef * kl if kl_coef else losses
    stats = _statistics(is_trained, ratio, advantages, clip_low, clip_high, dual_clip, kl)
    return (token_weights * losses).sum(), stats


def _clip_higher(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float
) -> Tensor:
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped)
    if not dual_clip:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)


def _bounded_exp(logratio: Tensor) -> Tensor:
    return logratio.clamp(-MAX_LOGRATIO, MAX_LOGRATIO).exp()


def _k3(difference: Tensor) -> Tensor:
    bounded = difference.clamp(-MAX_LOGRATIO, MAX_LOGRATIO)
    return torch.expm1(bounded) - bounded


@torch.no_grad()
def _statistics(
    is_trained: Tensor,
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl: Tensor | None,
) -> DapoLossStats:
    # Where a token does not train, ratio is 1 and the advantage 0: it counts nowhere below.
    nothing = torch.zeros((), dtype=torch.float32, device=ratio.device)
    is_bad = advantages < 0
    return DapoLossStats(
        tokens=is_trained.sum(dtype=torch.float32),
        clipped_high=((advantages > 0) & (ratio > 1 + clip_high)).sum(dtype=torch.float32),
        clipped_low=(is_bad & (ratio < 1 - clip_low)).sum(dtype=torch.float32),
        dual_clipped=(is_bad & (ratio > dual_clip)).sum(dtype=torch.float32)
        if dual_clip
        else nothing,
        kl_sum=nothing if kl is None else kl.sum(dtype=torch.float32),
        ratio_max_diff=(ratio - 1).abs().amax().float() if ratio.numel() else nothing,
    )


def _check_shapes(first: Tensor, *others: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in (first, *others)]
    if first.dim() != 1 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"dapo_loss: every per-token input must be [T], got shapes {shapes}.")
