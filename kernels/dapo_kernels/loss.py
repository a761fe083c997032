"""The DAPO loss of given log-probs: `dapo_loss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dapo_kernels import checks
from dapo_kernels.backend import operations
from dapo_kernels.terms import (
    ClipRule,
    DapoLossStats,
    PolicyTokens,
    TokenLosses,
    empty_losses,
)


def dapo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
    rollout_logprobs: Tensor | None = None,
    importance_cap: float = 2.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    entropy: Tensor | None = None,
) -> tuple[Tensor, DapoLossStats]:
    """This micro-batch's share of the loss: micro-batches, ranks and packings simply add up.

    sum_t w_t * (iw_t * L_t + kl_coef * k3_t), with r_t = exp(logprobs_t - old_logprobs_t),
    L_t = max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high)); under dual clip, where
    A_t < 0, L_t = min(L_t, -A_t dual_clip); k3_t = exp(d_t) - d_t - 1, d_t = ref - logprobs;
    iw_t = min(exp(old_logprobs_t - rollout_logprobs_t), importance_cap).

    One kernel launch forward on a GPU, sums in a fixed order; no host synchronisation.

    Source: DAPO, arXiv 2503.14476, Eq. 8; dual clip and the clamp of log-ratios to +-20 from verl;
    iw from Yao et al., "Your efficient RL framework secretly brings you off-policy RL training".
    The denominator lies in token_weights. Where a log-ratio is clamped there is no gradient.

    Args:
        logprobs: [T] float32, nats; current policy; carries the gradient.
        old_logprobs: [T] float32, nats; the learner's own, before the step's first update. None:
            those of this very call, so that r is 1 and the gradient -A.
        advantages: [T] float32; constant within one response.
        token_weights: [T] float32; loss mask over denominator. Where it is 0 the token adds
            exactly 0 to loss and gradient, whatever the other inputs hold there.
        clip_low: epsilon_low, positive.
        clip_high: epsilon_high, positive.
        dual_clip: bound c of the loss -A c of a token with A < 0; 0 turns it off.
        rollout_logprobs: [T] float32, nats; the engine's; None means iw = 1.
        importance_cap: largest iw.
        ref_logprobs: [T] float32, nats, of the reference policy; None where there is none.
        kl_coef: weight of the KL to the reference policy.
        entropy: [T] float32, nats; only for the statistics.

    Returns:
        The loss, a scalar in the dtype of logprobs, and statistics.

    Raises:
        ValueError: a shape, dtype or device differs, a weight is not finite (looked at on a CPU
            and in `checked_values`), or kl_coef without ref_logprobs.
    """
    rule = clip_rule(
        "dapo_loss",
        ref_logprobs,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        importance_cap=importance_cap,
        kl_coef=kl_coef,
    )
    tokens = PolicyTokens(
        old_logprobs=old_logprobs,
        rollout_logprobs=rollout_logprobs,
        advantages=advantages,
        token_weights=token_weights,
        ref_logprobs=ref_logprobs,
        entropy=entropy,
    )
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    checks.check_per_token("dapo_loss", {"logprobs": logprobs, **tokens.given()}, dtype)
    # The stubs of torch leave `apply` without types.
    loss, figures = _DapoLoss.apply(logprobs, tokens, rule)  # type: ignore[no-untyped-call]
    return loss, DapoLossStats.of(figures)


def token_losses(logprobs: Tensor, tokens: PolicyTokens, rule: ClipRule) -> TokenLosses:
    """Without gradient tracking; of no token as well."""
    if not len(logprobs):
        return empty_losses(logprobs)
    return operations(logprobs).token_losses(logprobs.detach(), tokens, rule)


def clip_rule(
    caller: str,
    ref_logprobs: Tensor | None,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    importance_cap: float,
    kl_coef: float,
) -> ClipRule:
    """Raises ValueError for numbers that are no rule."""
    if kl_coef and ref_logprobs is None:
        raise ValueError(
            f"{caller}: kl_coef = {kl_coef} needs ref_logprobs, got None; pass them, or 0."
        )
    if not (0 < clip_low < 1 and clip_high > 0):
        raise ValueError(
            f"{caller}: clip_low = {clip_low} must lie in (0, 1) and clip_high = {clip_high} be "
            "positive; both are distances from 1."
        )
    if dual_clip and dual_clip <= 1:
        raise ValueError(f"{caller}: dual_clip is {dual_clip}, expected above 1, or 0 for none.")
    if not importance_cap > 0:
        raise ValueError(f"{caller}: importance_cap is {importance_cap}, expected above 0.")
    return ClipRule(
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        importance_cap=importance_cap,
        kl_coef=kl_coef,
    )


class _DapoLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logprobs: Tensor, tokens: PolicyTokens, rule: ClipRule
    ) -> tuple[Tensor, Tensor]:
        losses = token_losses(logprobs, tokens, rule)
        ctx.save_for_backward(losses.slope)
        ctx.mark_non_differentiable(losses.figures)
        return losses.loss, losses.figures

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * grad_loss, None, None
