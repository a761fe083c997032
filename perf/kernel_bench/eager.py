"""The operations in plain torch: the eager peer, torch.compile's input, in float64 the truth.

Written apart from the kernels' own reference, so that a mistake there shows here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .inputs import LinearInputs, LogitsInputs, LossInputs
    from .task import Results

CLIP_LOW = 0.2
CLIP_HIGH = 0.28
IMPORTANCE_CAP = 2.0


def logprob(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob of each token, with gradient, and entropy, a figure."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    all_logprobs = torch.log_softmax(logits, dim=-1, dtype=dtype)
    with torch.no_grad():
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return all_logprobs.gather(1, token_ids[:, None]).squeeze(1), entropy


def linear_logprob(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    return logprob(hidden @ weight.t(), token_ids)


def dapo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    entropy: Tensor,
) -> tuple[Tensor, Tensor]:
    """The loss, and the figures a run looks at, as one vector."""
    logratio = (logprobs - old_logprobs).clamp(-20.0, 20.0)
    ratio = logratio.exp()
    importance = (old_logprobs - rollout_logprobs).exp().clamp(max=IMPORTANCE_CAP)
    clipped = ratio.clamp(1.0 - CLIP_LOW, 1.0 + CLIP_HIGH)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped)
    loss = (token_weights * importance * losses).sum()
    with torch.no_grad():
        is_trained = (token_weights != 0).to(logprobs.dtype)
        figures = torch.stack(
            [
                is_trained.sum(),
                (is_trained * ((advantages > 0) & (ratio > 1.0 + CLIP_HIGH))).sum(),
                (is_trained * ((advantages < 0) & (ratio < 1.0 - CLIP_LOW))).sum(),
                (is_trained * logratio).sum(),
                (is_trained * logratio.square()).sum(),
                (is_trained * ratio).sum(),
                (is_trained * importance).sum(),
                (is_trained * (importance >= IMPORTANCE_CAP)).sum(),
                (is_trained * entropy).sum(),
                (is_trained * (ratio - 1.0).abs()).amax(),
            ]
        )
    return loss, figures


FIGURES = (
    "tokens",
    "clipped_high",
    "clipped_low",
    "logratio_sum",
    "logratio_squared_sum",
    "ratio_sum",
    "importance_sum",
    "importance_capped",
    "entropy_sum",
    "ratio_max_diff",
)
"""Names of the figures above; of DapoLossStats, those that these inputs do not leave at zero."""


def loss_at(logprobs: Tensor, loss: LossInputs) -> tuple[Tensor, Tensor]:
    return dapo_loss(
        logprobs,
        loss.old_logprobs,
        loss.rollout_logprobs,
        loss.advantages,
        loss.token_weights,
        loss.entropy,
    )


def slope(loss: LossInputs) -> Tensor:
    """d loss / d log-probs, [T]."""
    logprobs = loss.logprobs.detach().requires_grad_()
    return torch.autograd.grad(loss_at(logprobs, loss)[0], logprobs)[0]


# ------------------------------------------------------------------ truth


def truth_of_logits(inputs: LogitsInputs) -> Results:
    logits = inputs.pristine.double().cpu().requires_grad_()
    token_ids, keep = inputs.token_ids.cpu(), inputs.keep.cpu()
    upstream = inputs.upstream.double().cpu()
    logprobs, entropy = logprob(logits, token_ids)
    loss, _ = loss_at(logprobs, inputs.loss.double())
    grad = torch.autograd.grad(logprobs, logits, upstream, retain_graph=True)[0]
    return {
        "largest_logit": logits.detach().abs().amax(),
        "logprobs": logprobs.detach(),
        "entropy": entropy,
        "grad_logits": grad,
        "logprobs_kept": torch.where(keep, logprobs.detach(), 0.0),
        "grad_logits_kept": torch.where(keep[:, None], grad, 0.0),
        "loss": loss.detach(),
        "grad_of_loss": torch.autograd.grad(loss, logits)[0],
    }


def truth_of_linear(inputs: LinearInputs) -> Results:
    hidden = inputs.hidden.double().cpu().requires_grad_()
    weight = inputs.weight.detach().double().cpu().requires_grad_()
    logprobs, entropy = linear_logprob(hidden, weight, inputs.token_ids.cpu())
    loss, _ = loss_at(logprobs, inputs.loss.double())
    in_rows = torch.zeros_like(logprobs)
    in_rows[inputs.rows.cpu()] = 1.0
    half = inputs.loss.double()
    half.token_weights = half.token_weights * in_rows
    results = {"logprobs": logprobs.detach(), "entropy": entropy, "loss": loss.detach()}
    upstream = (logprobs * inputs.upstream.double().cpu()).sum()
    of_rows, _ = loss_at(logprobs, half)
    values = {"": upstream, "_of_loss": loss, "_of_rows": of_rows, "_of_sum": -logprobs.sum()}
    for name, value in values.items():
        grads = torch.autograd.grad(value, (hidden, weight), retain_graph=True)
        results[f"grad_hidden{name}"], results[f"grad_weight{name}"] = grads
    results["sum"] = -logprobs.detach().sum()
    return results


def truth_of_loss(inputs: LossInputs) -> Results:
    exact = inputs.double()
    loss, figures = loss_at(exact.logprobs, exact)
    return {"loss": loss, "figures": figures, "slope": slope(exact)}
