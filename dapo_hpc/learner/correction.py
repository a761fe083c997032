"""The engine that samples and the learner that trains do not compute the same log-probs.

Three defences: importance weights, which the loss forms token by token (loss.importance_sampling);
figures that show the difference; and a guard against tokens for which the engine gave no finite
number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dapo_hpc.learner.packing import Member
from dapo_hpc.records import Group

MAX_LOGRATIO = 20.0
"""Log-ratios are clamped to +-20 nats before exp, as in the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """How far engine and learner are apart, over the trained tokens; mergeable."""

    sums: Tensor
    """[6] float64: tokens, |diff|, k3, weight, weight squared, weights at the cap. All-reduce
    with SUM."""
    max_diff: Tensor
    """Scalar float64, nats. All-reduce with MAX."""

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> Mismatch:
        """Of no token: merging it changes nothing."""
        zeros = torch.zeros(7, dtype=torch.float64, device=device)
        return cls(sums=zeros[:6], max_diff=zeros[6])

    def merge(self, other: Mismatch) -> Mismatch:
        """Of the tokens of both."""
        return Mismatch(
            sums=self.sums + other.sums, max_diff=torch.maximum(self.max_diff, other.max_diff)
        )

    def metrics(self) -> dict[str, float]:
        """The `mismatch/*` figures; {} without a token. Synchronises with the device."""
        tokens, diff, k3, weight, squared, capped = self.sums.tolist()
        if not tokens:
            return {}
        return {
            "mismatch/mean_diff": diff / tokens,
            "mismatch/max_diff": self.max_diff.item(),
            "mismatch/kl": k3 / tokens,
            "mismatch/ess_frac": weight * weight / (tokens * squared),
            "mismatch/capped_frac": capped / tokens,
        }


def measure_mismatch(
    old_logprobs: Tensor, rollout_logprobs: Tensor, loss_mask: Tensor, *, cap: float
) -> Mismatch:
    """Figures of one micro-batch; nothing is moved to the host.

    With d = old - rollout at the trained tokens and w the capped importance weight: |d|, its
    largest, the k3 estimate e^d - d - 1 of KL(rollout || old), the effective sample size
    (sum w)^2 / (T sum w^2), and the share of e^d >= cap.

    Args:
        old_logprobs: [T] float32, nats.
        rollout_logprobs: [T] float32, nats, finite where loss_mask is True.
        loss_mask: [T] bool.
        cap: of the importance weights.
    """
    difference = (old_logprobs.detach() - rollout_logprobs).double()
    difference = torch.where(loss_mask, difference, 0.0)
    bounded = difference.clamp(-MAX_LOGRATIO, MAX_LOGRATIO)
    mask = loss_mask.double()
    weights = bounded.exp().clamp(max=cap) * mask
    size = difference.abs()
    sums = torch.stack(
        (
            mask.sum(),
            size.sum(),
            (torch.expm1(bounded) - bounded).sum(),
            weights.sum(),
            (weights * weights).sum(),
            ((bounded.exp() >= cap) & loss_mask).sum(dtype=torch.float64),
        )
    )
    return Mismatch(sums=sums, max_diff=size.amax() if len(size) else sums.new_zeros(()))


def non_finite_tokens(
    members: Sequence[Member], groups: Mapping[int, Group], shape: tuple[int, int]
) -> np.ndarray:
    """Tokens whose rollout log-prob is not finite: they leave numerator and denominator.

    Call it once per step with all members of this data-parallel rank and sum the result over the
    data-parallel ranks, then hand it to packing.trained_tokens as `dropped`.

    Args:
        members: responses this rank trains in the step, each once.
        groups: by position in the train batch, at least those named by members.
        shape: (N, G) of the train batch.

    Returns:
        [N, G] int64; 0 at responses of other ranks.
    """
    dropped = np.zeros(shape, dtype=np.int64)
    for position, index in members:
        logprobs = groups[position].responses[index].rollout_logprobs
        dropped[position, index] = np.count_nonzero(~np.isfinite(logprobs))
    return dropped
