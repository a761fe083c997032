"""What anybody would write in torch: all logits in memory, autograd, one process.

Every line follows the dtype of its inputs, so this is the "same-dtype torch" of the measure
(logprob_truth) and what its rounding costs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logprob(
    logits: Tensor, token_ids: Tensor, *, temperature: float, valid_vocab: int
) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(logits[:, :valid_vocab] / temperature, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, token_ids[:, None]).squeeze(1), entropy


def linear_logprob(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, *, temperature: float, valid_vocab: int
) -> tuple[Tensor, Tensor]:
    return logprob(hidden @ weight.t(), token_ids, temperature=temperature, valid_vocab=valid_vocab)


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
) -> Tensor:
    """Of finite inputs, with log-ratios within +-20."""
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    ratio = (logprobs - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    if rollout_logprobs is not None:
        gain = gain * (old - rollout_logprobs).exp().clamp(max=importance_cap)
    loss = -(token_weights * gain).sum()
    if ref_logprobs is not None:
        difference = ref_logprobs - logprobs
        loss = loss + kl_coef * (token_weights * (difference.exp() - difference - 1)).sum()
    return loss
