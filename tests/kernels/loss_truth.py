"""The DAPO loss in float64 numpy, its slope and statistics, and all of linear_dapo_loss.

Nothing here comes from dapo_kernels. How far float32 may be from it: see logprob_truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from logprob_truth import (
    APPROXIMATION,
    LANES,
    UNIT,
    Bounded,
    Truth,
    array,
    is_among,
    linear_gradients,
    linear_softmax,
    logits_gradient,
)
from torch import Tensor

MAX_LOGRATIO = 20.0


@dataclass(frozen=True)
class LossTruth:
    loss: Bounded
    """Scalar."""
    slope: Bounded
    """[T]: derivative of the loss by each log-prob."""
    statistics: Truth
    """By the names of DapoLossStats; counts are exact."""


@dataclass(frozen=True)
class _Part:
    """A part of the loss of each token, and its derivative by the log-prob."""

    value: Bounded
    slope: Bounded


def loss_truth(
    logprobs: np.ndarray,
    *,
    old_logprobs: np.ndarray | None,
    advantages: np.ndarray,
    token_weights: np.ndarray,
    rollout_logprobs: np.ndarray | None = None,
    ref_logprobs: np.ndarray | None = None,
    entropy: np.ndarray | None = None,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
    importance_cap: float = 2.0,
    kl_coef: float = 0.0,
    error: np.ndarray | float = 0.0,
    entropy_error: np.ndarray | float = 0.0,
) -> LossTruth:
    """`error` [T]: of the log-probs. Ratios at the very edge of a clip are the caller's affair."""
    is_weighted = token_weights != 0
    counts = is_weighted & np.isfinite(logprobs)

    def column(values: np.ndarray | None, otherwise: np.ndarray | float = 0.0) -> np.ndarray:
        return np.where(counts, otherwise if values is None else values, 0.0)

    weights, current = column(token_weights), column(logprobs)
    old, advantage = column(old_logprobs, current), column(advantages)
    clip = (clip_low, clip_high, dual_clip)
    of_ratio, of_old = (0.0, error) if old_logprobs is None else (error, 0.0)
    gain, ratio_statistics = _clipped(current - old, advantage, clip, of_ratio, counts)
    importance = Bounded(np.ones_like(weights), np.zeros_like(weights))
    if rollout_logprobs is not None:
        importance = _importance(old - column(rollout_logprobs), importance_cap, of_old)
    kl = _Part(*(Bounded(np.zeros_like(weights), np.zeros_like(weights)) for _ in range(2)))
    if ref_logprobs is not None:
        kl = _k3(column(ref_logprobs) - current, error)

    def total(gain: Bounded, kl: Bounded) -> Bounded:
        """weight * (importance * gain + kl_coef * kl), with six roundings of its terms."""
        iw, size = importance.value, np.abs(weights)
        allowed = iw * gain.allowed + importance.allowed * np.abs(gain.value)
        allowed = allowed + kl_coef * kl.allowed
        terms = iw * np.abs(gain.value) + kl_coef * np.abs(kl.value)
        value = weights * (iw * gain.value + kl_coef * kl.value)
        return Bounded(value, size * (allowed + 6 * UNIT * terms))

    has_rollout = rollout_logprobs is not None
    statistics = {
        "tokens": _count(is_weighted),
        "impossible": _count(is_weighted & ~counts),
        **ratio_statistics,
        "importance_sum": _sum(importance, counts),
        "importance_capped": _count(counts & (importance.value >= importance_cap) & has_rollout),
        "kl_sum": _sum(kl.value, counts),
        "entropy_sum": _sum(Bounded(column(entropy), entropy_error * counts), counts),
    }
    return LossTruth(
        _sum(total(gain.value, kl.value), counts), total(gain.slope, kl.slope), statistics
    )


def _clipped(
    difference: np.ndarray,
    advantage: np.ndarray,
    clip: tuple[float, float, float],
    error: np.ndarray | float,
    counts: np.ndarray,
) -> tuple[_Part, Truth]:
    """max(-A r, -A clip(r)), below c |A| for A < 0; flat where a clip is what counts."""
    clip_low, clip_high, dual_clip = clip
    logratio = np.clip(difference, -MAX_LOGRATIO, MAX_LOGRATIO)
    ratio = np.exp(logratio)
    of_logratio = error + 4 * UNIT * np.abs(difference)
    of_ratio = ratio * (of_logratio + _of_exp(difference))
    is_high = (advantage > 0) & (ratio > 1 + clip_high)
    is_low = (advantage < 0) & (ratio < 1 - clip_low)
    is_dual = (advantage < 0) & (ratio > dual_clip) & bool(dual_clip)
    bounded = np.clip(ratio, 1 - clip_low, 1 + clip_high)
    losses = np.maximum(-advantage * ratio, -advantage * bounded)
    losses = np.where(is_dual, -dual_clip * advantage, losses)
    is_flat = is_high | is_low | is_dual | (np.abs(difference) > MAX_LOGRATIO)
    slopes = np.where(is_flat, 0.0, -advantage * ratio)
    of_slopes = np.abs(advantage) * np.where(is_flat, 0.0, of_ratio)
    of_losses = np.abs(advantage) * np.where(is_high | is_low | is_dual, 0.0, of_ratio)
    part = _Part(Bounded(losses, of_losses + 4 * UNIT * np.abs(losses)), Bounded(slopes, of_slopes))
    statistics = {
        "clipped_high": _count(is_high),
        "clipped_low": _count(is_low),
        "dual_clipped": _count(is_dual),
        "logratio_sum": _sum(Bounded(logratio, of_logratio), counts),
        "logratio_squared_sum": _sum(
            Bounded(logratio**2, 2 * np.abs(logratio) * of_logratio), counts
        ),
        "ratio_sum": _sum(Bounded(ratio, of_ratio), counts),
        "ratio_max_diff": _largest(Bounded(np.abs(ratio - 1), of_ratio + UNIT), counts),
    }
    return part, statistics


def _importance(mismatch: np.ndarray, cap: float, error: np.ndarray | float) -> Bounded:
    weights = np.exp(np.clip(mismatch, -MAX_LOGRATIO, MAX_LOGRATIO))
    is_capped = weights >= cap
    allowed = weights * (error + _of_exp(mismatch))
    return Bounded(np.minimum(weights, cap), np.where(is_capped, UNIT * cap, allowed))


def _k3(distance: np.ndarray, error: np.ndarray | float) -> _Part:
    """exp(d) - d - 1, of an exp(d) - 1 that is exact to a few roundings of itself where d is small:
    else nothing would be left of d^2 / 2. The slope may have been through 1 + d."""
    away = np.clip(distance, -MAX_LOGRATIO, MAX_LOGRATIO)
    growth = np.expm1(away)
    of_growth = 8 * UNIT * np.abs(growth)
    of_growth = of_growth + np.where(np.abs(away) < 0.05, 0.0, np.exp(away) * _of_exp(away))
    of_distance = error + UNIT * np.abs(away)
    of_value = np.abs(growth) * of_distance + of_growth + 2 * UNIT * np.abs(away)
    return _Part(
        Bounded(growth - away, of_value),
        Bounded(
            np.where(np.abs(distance) <= MAX_LOGRATIO, -growth, 0.0),
            np.exp(away) * of_distance + of_growth + 2 * UNIT,
        ),
    )


def linear_dapo_truth(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    tokens: dict[str, Tensor | None],
    *,
    temperature: float,
    valid_vocab: int,
    rows: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    **rule: float,
) -> tuple[Truth, Truth]:
    """Of linear_dapo_loss: (loss, grad_hidden, grad_weight), and the statistics.

    `tokens`: old_logprobs, rollout_logprobs, advantages, token_weights, ref_logprobs.
    """
    softmax = linear_softmax(
        hidden,
        weight,
        token_ids,
        temperature=temperature,
        valid_vocab=valid_vocab,
        logits_dtype=logits_dtype,
    )
    columns: dict[str, Any] = {k: None if v is None else array(v) for k, v in tokens.items()}
    columns["token_weights"] = columns["token_weights"] * is_among(len(hidden), rows)
    losses = loss_truth(
        softmax.logprobs,
        **columns,
        entropy=softmax.entropy,
        error=softmax.error,
        entropy_error=softmax.entropy_error,
        **rule,
    )
    gradient = logits_gradient(
        softmax, losses.slope.value, np.zeros_like(losses.slope.value), temperature
    )
    size = softmax.probabilities.copy()
    size[np.arange(len(size)), softmax.token_ids] += 1.0
    allowed = gradient.allowed + size * losses.slope.allowed[:, None] / temperature
    gradients = linear_gradients(hidden, weight, Bounded(gradient.value, allowed))
    return {"loss": losses.loss, **gradients}, losses.statistics


def _of_exp(argument: np.ndarray) -> np.ndarray:
    """Relative error of exp in float32: of its argument times log2 e, and one approximation."""
    return APPROXIMATION + UNIT * (4 + 4 * np.abs(argument))


def _count(is_one: np.ndarray) -> Bounded:
    return Bounded(np.float64(is_one.sum()), np.float64(0.0))


def _sum(terms: Bounded, counts: np.ndarray) -> Bounded:
    values, errors = terms.value * counts, terms.allowed * counts
    additions = (len(values) / LANES + 16) * UNIT * np.abs(values).sum()
    return Bounded(values.sum(), errors.sum() + additions)


def _largest(terms: Bounded, counts: np.ndarray) -> Bounded:
    if not counts.any():
        return Bounded(np.float64(0.0), np.float64(0.0))
    worst = int(np.argmax(terms.value * counts))
    return Bounded(terms.value[worst], terms.allowed[worst])
