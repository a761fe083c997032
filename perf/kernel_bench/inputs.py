"""Inputs shaped like a policy's: peaked rows, uneven signed gradients, never zeros.

Nobody's kernel runs the same on zeros: data that does not toggle bits draws less power and lets
the clocks rise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import eager
from .task import Sizes

NOISE = 2.0
"""Standard deviation of the logits that do not matter."""
RISE = (-2.0, 9.0)
"""Range of log(p / (1 - p)) of the token that stands out: p from 0.12 to 0.9999."""
SEQUENCES = 8
ROWS_AT_A_TIME = 512
SEED = 20250318


@dataclass
class LossInputs:
    """What the loss knows of each token, all [T] float32."""

    logprobs: Tensor
    old_logprobs: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    token_weights: Tensor
    entropy: Tensor

    def moving_frac(self) -> float:
        """Tokens with a gradient: not masked, not clipped."""
        return (eager.slope(self) != 0).double().mean().item()

    def double(self) -> LossInputs:
        return LossInputs(**{name: value.double().cpu() for name, value in vars(self).items()})


@dataclass
class LogitsInputs:
    logits: Tensor
    """[T, V]; a backward in place destroys it."""
    pristine: Tensor
    token_ids: Tensor
    upstream: Tensor
    """[T] float32: what a loss would hand to the log-probs; signed, uneven, nowhere zero."""
    keep: Tensor
    """[T] bool: every other row."""
    loss: LossInputs

    def restore(self) -> None:
        self.logits.copy_(self.pristine)

    def leaf(self) -> Tensor:
        return self.logits.detach().requires_grad_()


@dataclass
class LinearInputs:
    hidden: Tensor
    weight: Tensor
    """[V, H], a leaf; `main_grad` as Megatron's DDP has it."""
    token_ids: Tensor
    upstream: Tensor
    """[T] float32: the slope of the loss at the log-probs, for peers that have no loss."""
    rows: Tensor
    """[T / 2] int64: every other row."""
    loss: LossInputs

    def restore(self) -> None:
        """Nothing is destroyed; main_grad goes on adding up."""

    def leaf(self) -> Tensor:
        return self.hidden.detach().requires_grad_()


def draw_loss(sizes: Sizes, device: torch.device) -> LossInputs:
    generator = torch.Generator(device).manual_seed(SEED)
    logprobs = -torch.rand(sizes.tokens, device=device, generator=generator).square() * 6
    return _loss_inputs(logprobs, logprobs.abs() + 0.3, generator)


def draw_logits(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> LogitsInputs:
    generator = torch.Generator(device).manual_seed(SEED)
    logits = torch.empty(sizes.tokens, sizes.vocab, dtype=dtype, device=device)
    token_ids, peaks, rises = _peaks(sizes, device, generator)
    for rows in _slices(sizes.tokens):
        noise = torch.randn(logits[rows].shape, device=device, generator=generator) * NOISE
        # The softmax does not know the level of a row; rounding does.
        level = torch.randn(len(noise), 1, device=device, generator=generator) * 4
        noise.scatter_(1, peaks[rows, None], rises[rows, None])
        logits[rows] = (noise + level).to(dtype)
    logprobs, entropy = _score(lambda rows: logits[rows], token_ids)
    upstream = torch.randn(sizes.tokens, device=device, generator=generator)
    return LogitsInputs(
        logits=logits,
        pristine=logits.clone(),
        token_ids=token_ids,
        upstream=upstream,
        keep=torch.arange(sizes.tokens, device=device) % 2 == 0,
        loss=_loss_inputs(logprobs, entropy, generator),
    )


def draw_linear(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> LinearInputs:
    generator = torch.Generator(device).manual_seed(SEED)
    shape, scale = (sizes.vocab, sizes.hidden), NOISE / math.sqrt(sizes.hidden)
    weight = torch.randn(shape, device=device, generator=generator, dtype=dtype).mul_(scale)
    shape = (sizes.tokens, sizes.hidden)
    hidden = torch.randn(shape, device=device, generator=generator)
    token_ids, peaks, rises = _peaks(sizes, device, generator)
    # Along its own row of the weight, whose squared length is NOISE^2, the peak's logit rises.
    hidden += weight[peaks].float() * (rises / NOISE**2)[:, None]
    hidden = hidden.to(dtype)
    logprobs, entropy = _score(lambda rows: hidden[rows] @ weight.t(), token_ids)
    loss = _loss_inputs(logprobs, entropy, generator)
    weight.requires_grad_()
    weight.main_grad = torch.zeros(weight.shape, device=device)
    return LinearInputs(
        hidden=hidden,
        weight=weight,
        token_ids=token_ids,
        upstream=eager.slope(loss),
        rows=torch.arange(0, sizes.tokens, 2, device=device),
        loss=loss,
    )


def _peaks(
    sizes: Sizes, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, the token that stands out in each row, and its logit. Nine of ten are the same."""
    shape = (sizes.tokens,)
    peaks = torch.randint(sizes.vocab, shape, device=device, generator=generator)
    others = torch.randint(sizes.vocab, shape, device=device, generator=generator)
    is_peak = torch.rand(shape, device=device, generator=generator) < 0.9
    low, high = RISE
    odds = torch.rand(shape, device=device, generator=generator) * (high - low) + low
    log_of_the_rest = math.log(sizes.vocab) + NOISE**2 / 2
    return torch.where(is_peak, peaks, others), peaks, odds + log_of_the_rest


def _loss_inputs(logprobs: Tensor, entropy: Tensor, generator: torch.Generator) -> LossInputs:
    """Ratios on both sides of both clips, and away from their edges: rounding flips no token."""
    shape, device = logprobs.shape, logprobs.device

    def uniform() -> Tensor:
        return torch.rand(shape, device=device, generator=generator)

    steps = logprobs.new_tensor([-0.5, -0.1, -0.03, 0.03, 0.1, 0.5])
    old = logprobs + steps[(uniform() * len(steps)).long().clamp_(max=len(steps) - 1)]
    length = max(1, len(logprobs) // SEQUENCES)
    sequence = torch.arange(len(logprobs), device=device) // length
    advantages = torch.randn(len(logprobs), device=device, generator=generator)[sequence]
    weights = torch.where(uniform() < 0.1, 0.0, 1.0 / len(logprobs))
    # Kernels that see [sequences, length] tokens predict nothing from the last one.
    weights[length - 1 :: length] = 0.0
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=old,
        rollout_logprobs=old - torch.where(uniform() < 0.02, 1.0, (uniform() - 0.5) * 0.1),
        advantages=advantages,
        token_weights=weights,
        entropy=entropy,
    )


def _score(logits_of: Callable[[slice], Tensor], token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy of a few rows at a time, in float32."""
    parts = []
    with torch.no_grad():
        for rows in _slices(len(token_ids)):
            parts.append(eager.logprob(logits_of(rows), token_ids[rows]))
    logprobs, entropy = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def _slices(count: int) -> Iterator[slice]:
    for start in range(0, count, ROWS_AT_A_TIME):
        yield slice(start, start + ROWS_AT_A_TIME)
