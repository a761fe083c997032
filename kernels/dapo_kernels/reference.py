"""The same functions in a few obvious lines of torch each: one process, all logits in memory.

For tests and as the eager baseline of benchmarks. Every line follows the dtype of its inputs, so
float64 inputs give the truth and bfloat16 inputs give what plain torch would lose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dapo_kernels.loss import MAX_LOGRATIO


def linear_logprob(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, *, temperature: float, valid_vocab: int
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy of softmax(hidden weight^T / temperature), the rows beyond
    valid_vocab left out; both with gradient."""
    logits = hidden @ weight[:valid_vocab].t() / temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, token_ids[:, None]).squeeze(1), entropy


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
) -> Tensor:
    """sum_t w_t (-iw_t min(r A, clip(r) A) + kl_coef k3_t) of finite inputs; see loss.dapo_loss."""
    ratio = (logprobs - old_logprobs).clamp(-MAX_LOGRATIO, MAX_LOGRATIO).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    if importance_weights is not None:
        gain = gain * importance_weights
    loss = -(token_weights * gain).sum()
    if ref_logprobs is not None:
        difference = (ref_logprobs - logprobs).clamp(-MAX_LOGRATIO, MAX_LOGRATIO)
        loss = loss + kl_coef * (token_weights * (difference.exp() - difference - 1)).sum()
    return loss
