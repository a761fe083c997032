"""Inputs, the float64 truth and the measure of error for the tests of linear_logprob.

The measure is that of Cut Cross-Entropy: an element's error may not exceed the error plain torch
makes in the same dtype at that element, plus what float32 arithmetic itself may lose (`Truth`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dapo_kernels import linear_logprob, reference

UNIT = 2.0**-24
"""Largest relative error of one float32 rounding."""
ROUNDINGS = 16
"""Roundings in a row behind one value: about 8 in a blocked dot product, 8 after it."""


@dataclass
class Inputs:
    hidden: Tensor
    weight: Tensor
    token_ids: Tensor
    upstream: Tensor
    temperature: float
    valid_vocab: int

    def run(self, **options: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probs, entropy, and the gradients of hidden and weight."""
        hidden, weight = self.leaves()
        logprobs, entropy = linear_logprob(
            hidden,
            weight,
            self.token_ids,
            temperature=self.temperature,
            vocab_start=0,
            valid_vocab=self.valid_vocab,
            group=None,
            **options,
        )
        return self._with_gradients(hidden, weight, logprobs, entropy)

    def run_plain_torch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden, weight = self.leaves()
        logprobs, entropy = reference.linear_logprob(
            hidden,
            weight,
            self.token_ids,
            temperature=self.temperature,
            valid_vocab=self.valid_vocab,
        )
        return self._with_gradients(hidden, weight, logprobs, entropy)

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()

    def _with_gradients(
        self, hidden: Tensor, weight: Tensor, logprobs: Tensor, entropy: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logprobs.backward(self.upstream.to(logprobs.dtype))
        assert hidden.grad is not None
        assert weight.grad is not None
        return logprobs.detach(), entropy.detach(), hidden.grad, weight.grad


class Truth:
    """Everything in float64 numpy, and for each result what float32 arithmetic may lose.

    A logit's error is at most ROUNDINGS * UNIT * sum |h| |w|; log-prob and entropy differ by at
    most twice that, and a few roundings of their own size. A probability has the same error,
    relatively; the matrix products of the gradients carry it through absolute values. A result
    that is stored in bfloat16 is rounded once more, by 2^-9 of itself.
    """

    def __init__(self, inputs: Inputs) -> None:
        hidden, weight = (x.double().numpy() for x in (inputs.hidden, inputs.weight))
        rows = weight[: inputs.valid_vocab]
        picks = np.arange(len(hidden)), inputs.token_ids.numpy()
        logits = hidden @ rows.T / inputs.temperature
        shifted = logits - logits.max(1, keepdims=True)
        probabilities = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
        logprobs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        one_hot = np.zeros_like(logits)
        one_hot[picks] = 1.0
        upstream = inputs.upstream.double().numpy()[:, None] / inputs.temperature
        grad = (one_hot - probabilities) * upstream
        grad_weight = np.zeros_like(weight)
        grad_weight[: len(rows)] = grad.T @ hidden
        self.values = (
            logprobs[picks],
            -(probabilities * logprobs).sum(1),
            grad @ rows,
            grad_weight,
        )

        unit = ROUNDINGS * UNIT
        of_logit = unit * (np.abs(hidden) @ np.abs(rows).T).max(1) / inputs.temperature
        of_value = 2 * of_logit + unit * (1 + np.abs(logprobs).max(1))
        size = (one_hot + probabilities) * np.abs(upstream) * of_value[:, None]
        stored = 2.0**-9 if inputs.hidden.dtype == torch.bfloat16 else 0.0
        of_weight = np.zeros_like(weight)
        of_weight[: len(rows)] = size.T @ np.abs(hidden)
        self.allowed = (
            of_value,
            of_value * (1 + np.abs(logprobs).max(1)),
            size @ np.abs(rows) + stored * np.abs(self.values[2]),
            of_weight + stored * np.abs(self.values[3]),
        )


def assert_no_worse_than_torch(
    results: tuple[Tensor, ...], plain: tuple[Tensor, ...], truth: Truth
) -> None:
    names = ("logprobs", "entropy", "grad of hidden", "grad of weight")
    for name, got, ref, true, allowed in zip(
        names, results, plain, truth.values, truth.allowed, strict=True
    ):
        error = np.abs(got.double().numpy() - true)
        bound = np.abs(ref.double().numpy() - true) + allowed
        worst = np.unravel_index(np.argmax(error - bound), error.shape)
        assert (error <= bound).all(), f"{name}{worst}: {error[worst]} > {bound[worst]}"


def draw(
    num_tokens: int,
    size: int,
    rows: int,
    *,
    valid: int | None = None,
    dtype: torch.dtype = torch.float32,
    temperature: float = 0.7,
    seed: int = 0,
) -> Inputs:
    """Peaked rows, signed and uneven upstream gradients, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, size, generator=generator)
    weight = torch.randn(rows, size, generator=generator) * 3 / size**0.5
    upstream = torch.randn(num_tokens, generator=generator)
    upstream[::5] = 0.0
    valid = rows if valid is None else valid
    return Inputs(
        hidden=hidden.to(dtype),
        weight=weight.to(dtype),
        token_ids=torch.randint(0, valid, (num_tokens,), generator=generator),
        upstream=upstream,
        temperature=temperature,
        valid_vocab=valid,
    )
