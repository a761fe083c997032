"""What the DAPO loss is made of: its rule, its per-token inputs, and the figures it reports."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

MAX_LOGRATIO = 20.0
"""Log-ratios are clamped to +-20 nats, so that exp stays finite. Source: verl."""
NUM_SLOTS = 16
"""Length of the vector of figures: the loss, then the fields of DapoLossStats, then unused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipRule:
    """The numbers of the loss; see `dapo_loss`."""

    clip_low: float
    clip_high: float
    dual_clip: float
    importance_cap: float
    kl_coef: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTokens:
    """What stands beside each log-prob in the loss: [T] each, None where there is none."""

    old_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    advantages: Tensor
    token_weights: Tensor
    ref_logprobs: Tensor | None
    entropy: Tensor | None

    def given(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in pairs if value is not None}

    def take(self, index: Tensor | slice) -> PolicyTokens:
        """Of some of the tokens."""
        return replace(self, **{name: value[index] for name, value in self.given().items()})

    def with_entropy(self, entropy: Tensor) -> PolicyTokens:
        return replace(self, entropy=entropy)


@dataclass(frozen=True, slots=True, kw_only=True)
class DapoLossStats:
    """Figures over the trained tokens (weight not 0): 0-d float32 tensors on the loss's device.

    Those of several micro-batches add up, except ratio_max_diff, of which the largest counts.
    Log-ratios are those of the loss, clamped to +-20 nats.
    """

    tokens: Tensor
    """Trained tokens."""
    clipped_high: Tensor
    """Tokens with A > 0 whose ratio is above 1 + clip_high: no gradient."""
    clipped_low: Tensor
    """Tokens with A < 0 whose ratio is below 1 - clip_low: no gradient."""
    dual_clipped: Tensor
    """Tokens with A < 0 whose ratio is above dual_clip: no gradient."""
    impossible: Tensor
    """Tokens of log-prob -inf: they add nothing to the loss or to what follows."""
    logratio_sum: Tensor
    """Sum of logprobs - old_logprobs, nats; verl's ppo_kl is minus its mean."""
    logratio_squared_sum: Tensor
    """Sum of (logprobs - old_logprobs)^2; half its mean estimates the KL as well (k2)."""
    ratio_sum: Tensor
    """Sum of the ratios; its mean leaves 1 when the policy leaves the old one."""
    importance_sum: Tensor
    """Sum of the truncated importance weights; 1 a token without rollout_logprobs."""
    importance_capped: Tensor
    """Tokens whose importance weight is at its cap."""
    kl_sum: Tensor
    """Sum of the k3 estimates of KL(policy || reference), nats; 0 without reference."""
    entropy_sum: Tensor
    """Sum of the entropies, nats; 0 where none were given."""
    ratio_max_diff: Tensor
    """Largest |ratio - 1|."""

    @classmethod
    def of(cls, figures: Tensor) -> DapoLossStats:
        """Views of the vector [NUM_SLOTS] whose first slot is the loss."""
        return cls(**dict(zip(STATISTICS, figures[1:].unbind(), strict=False)))


STATISTICS = tuple(field.name for field in fields(DapoLossStats))
MAX_SLOT = 1 + STATISTICS.index("ratio_max_diff")
"""The slot that is no sum."""


def add_up(figures: Tensor) -> Tensor:
    """[N, NUM_SLOTS] of N chunks -> [NUM_SLOTS] of all their tokens."""
    total = figures.sum(0)
    if len(figures):
        total[MAX_SLOT] = figures[:, MAX_SLOT].amax()
    return total


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """What a backend makes of some tokens."""

    loss: Tensor
    """Scalar, in the dtype of the log-probs."""
    slope: Tensor
    """[T] d loss / d logprobs, in the dtype of the log-probs."""
    figures: Tensor
    """[NUM_SLOTS] float32: the loss, then the statistics."""


@dataclass(frozen=True, slots=True)
class RowResults:
    """What a backend makes of the statistics of some rows of logits."""

    logprobs: Tensor
    """[C] nats, at most 0."""
    entropy: Tensor
    """[C] nats, at least 0."""
    normalizer: Tensor
    """[C, 2]: what probabilities are formed with, the largest logit and the log of the sum of exp
    of what is left, in units of the backend. Two numbers, because their sum would round small
    log-probs away."""

    def take(self, index: slice) -> RowResults:
        return RowResults(self.logprobs[index], self.entropy[index], self.normalizer[index])


def empty_losses(logprobs: Tensor) -> TokenLosses:
    """Of no token."""
    zero = logprobs.new_zeros(())
    figures = torch.zeros(NUM_SLOTS, dtype=torch.float32, device=logprobs.device)
    return TokenLosses(zero, torch.zeros_like(logprobs), figures)
