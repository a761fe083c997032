"""Log-prob, entropy and their gradients in float64 numpy, and what float32 may lose of them.

Nothing here comes from dapo_kernels: truth must not be made by the code under test. The measure
is that of Cut Cross-Entropy: an element's error may not exceed the error plain torch makes in the
same dtype at that element, plus `allowed`, the worst that float32 arithmetic itself can do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from kernel_backends import IS_INTERPRETED
from torch import Tensor

UNIT = 2.0**-24
"""Largest relative error of one float32 rounding."""
APPROXIMATION = 2.0**-22
"""Largest error of the GPU's ex2 (relative) and lg2 (relative, absolute near 1)."""
BF16_ROUNDING = 2.0**-7 if IS_INTERPRETED else 2.0**-8
"""Largest relative error of one rounding to bfloat16; Triton's interpreter cuts off instead."""
TINY = 2.0**-126
"""Smallest normal number of both: below it a GPU may flush to zero."""
SCALING_ROUNDINGS = 8
"""Of a scaled logit: 1/T, log2 e, their product, it times the logit, the maximum, its scaling, the
difference, and ln 2 on the way back."""
DOT_ROUNDINGS = 16
"""Behind one element of a matrix product: a dot product in blocks of 8 or more, and their sum."""
LANES = 1024
"""A row's sum is formed in at least so many lanes (or by pairs), which are then added up."""


@dataclass(frozen=True)
class Bounded:
    """A true value, and how far beyond plain torch's error a result may be from it."""

    value: np.ndarray
    allowed: np.ndarray


Truth = dict[str, Bounded]


@dataclass(frozen=True)
class Softmax:
    """Each row's distribution over its valid columns; 0 probability elsewhere."""

    token_ids: np.ndarray
    """[T]"""
    every_logprob: np.ndarray
    """[T, V]; -inf in padding."""
    probabilities: np.ndarray
    """[T, V]"""
    entropy: np.ndarray
    """[T]"""
    error: np.ndarray
    """[T]: of any log-prob of the row, absolute; of its probabilities, relative."""
    entropy_error: np.ndarray
    """[T]"""

    @property
    def logprobs(self) -> np.ndarray:
        """[T]: of the given tokens."""
        picked: np.ndarray = self.every_logprob[np.arange(len(self.token_ids)), self.token_ids]
        return picked


def softmax_truth(
    logits: np.ndarray,
    token_ids: np.ndarray,
    *,
    temperature: float,
    valid_vocab: int,
    logit_error: np.ndarray | float = 0.0,
) -> Softmax:
    """`logit_error` [T]: of the logits themselves, beside that of the arithmetic here.

    Scaled logits err by SCALING_ROUNDINGS of the largest; the sum of exponentials by that, one
    approximation, and as many roundings as it has terms in a lane; its logarithm by one more. The
    entropy is a mean of log-probs and errs like them, and by the error of its weights times
    their spread.
    """
    scaled = np.full(logits.shape, -np.inf)
    scaled[:, :valid_vocab] = logits[:, :valid_vocab] / temperature
    maximum = scaled.max(1, keepdims=True, initial=-np.inf)
    shifted = scaled - np.where(np.isneginf(maximum), 0.0, maximum)
    total = np.exp(shifted).sum(1, keepdims=True)
    log_total = np.log(np.where(total == 0, 1.0, total))
    every = shifted - log_total
    probabilities = np.exp(every)
    entropy = -(probabilities * _finite(every)).sum(1)

    size = np.abs(_finite(scaled)).max(1, initial=0.0)
    reach = np.abs(_finite(every)).max(1, initial=0.0)
    spread = (probabilities * np.abs(_finite(shifted))).sum(1)
    of_logit = SCALING_ROUNDINGS * UNIT * size + logit_error / temperature
    of_total = of_logit + APPROXIMATION + (valid_vocab / LANES + 12) * UNIT
    of_logarithm = APPROXIMATION * (1 + log_total[:, 0])
    error = of_logit + of_total + of_logarithm + 4 * UNIT * (1 + reach)
    return Softmax(
        token_ids, every, probabilities, entropy, error, error + 2 * of_total * (1 + spread)
    )


def logits_gradient(
    softmax: Softmax, grad_logprobs: np.ndarray, grad_entropy: np.ndarray, temperature: float
) -> Bounded:
    """[T, V]: ((1[token] - p) grad_logprobs - p (log p + entropy) grad_entropy) / temperature.

    A log-prob of -inf hands no gradient on. A probability errs by its logarithm's error,
    relatively, and by one approximation; what it is multiplied with by a few roundings.
    """
    grad_logprobs = np.where(np.isneginf(softmax.logprobs), 0.0, grad_logprobs)
    to_logprob, to_entropy = (
        grad_logprobs[:, None] / temperature,
        grad_entropy[:, None] / temperature,
    )
    one_hot = np.zeros_like(softmax.probabilities)
    one_hot[np.arange(len(one_hot)), softmax.token_ids] = 1.0
    p, every = softmax.probabilities, _finite(softmax.every_logprob)
    entropy, entropy_error = softmax.entropy[:, None], softmax.entropy_error[:, None]
    value = (one_hot - p) * to_logprob - p * (every + entropy) * to_entropy

    of_p = softmax.error[:, None] + APPROXIMATION + 4 * UNIT
    own = 8 * UNIT * one_hot
    slope = np.abs(every) + entropy
    allowed = np.abs(to_logprob) * (p * of_p + own)
    allowed += np.abs(to_entropy) * p * (slope * of_p + of_p + entropy_error)
    return Bounded(value, allowed + 1024 * TINY)


def logprob_truth(
    logits: Tensor,
    token_ids: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    *,
    temperature: float,
    valid_vocab: int,
    keep: Tensor | None = None,
) -> Truth:
    """Of `logprob`: logprobs, entropy, grad_logits."""
    kept = np.ones(len(logits), bool) if keep is None else array(keep)
    softmax = softmax_truth(
        np.where(kept[:, None], array(logits), 0.0),
        np.where(kept, array(token_ids), 0),
        temperature=temperature,
        valid_vocab=valid_vocab,
    )
    gradient = logits_gradient(
        softmax, array(grad_logprobs) * kept, array(grad_entropy) * kept, temperature
    )
    return {
        **value_truth(softmax, kept),
        "grad_logits": stored(gradient, logits.dtype),
    }


def linear_truth(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    *,
    temperature: float,
    valid_vocab: int,
    rows: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Truth:
    """Of `linear_logprob`: logprobs, entropy, grad_hidden, grad_weight."""
    kept = is_among(len(hidden), rows)
    softmax = linear_softmax(
        hidden,
        weight,
        token_ids,
        temperature=temperature,
        valid_vocab=valid_vocab,
        logits_dtype=logits_dtype,
    )
    gradient = logits_gradient(
        softmax, array(grad_logprobs) * kept, array(grad_entropy) * kept, temperature
    )
    return {**value_truth(softmax, kept), **linear_gradients(hidden, weight, gradient)}


def linear_softmax(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    temperature: float,
    valid_vocab: int,
    logits_dtype: torch.dtype | None = None,
) -> Softmax:
    """Of logits hidden weight^T, each a dot product in float32; rounded if they are bfloat16."""
    logits = array(hidden) @ array(weight).T
    terms = (np.abs(array(hidden)) @ np.abs(array(weight)).T)[:, :valid_vocab]
    error = DOT_ROUNDINGS * UNIT * terms.max(1, initial=0.0)
    if logits_dtype == torch.bfloat16:
        error = error + BF16_ROUNDING * np.abs(logits[:, :valid_vocab]).max(1, initial=0.0)
    return softmax_truth(
        logits,
        array(token_ids),
        temperature=temperature,
        valid_vocab=valid_vocab,
        logit_error=error,
    )


def linear_gradients(hidden: Tensor, weight: Tensor, gradient: Bounded) -> Truth:
    """grad_hidden and grad_weight from the logits' gradient.

    With bfloat16 inputs the gradient of the logits is rounded to bfloat16 once before the two
    products, on every path there is: only so are they bfloat16 products.
    """
    outer = stored(gradient, hidden.dtype)
    return {
        "grad_hidden": stored(_product(outer, array(weight)), hidden.dtype),
        "grad_weight": stored(
            _product(Bounded(outer.value.T, outer.allowed.T), array(hidden)), weight.dtype
        ),
    }


def value_truth(softmax: Softmax, kept: np.ndarray) -> Truth:
    """logprobs and entropy; exactly 0 for the rows left out."""
    return {
        "logprobs": Bounded(np.where(kept, softmax.logprobs, 0.0), softmax.error * kept),
        "entropy": Bounded(softmax.entropy * kept, softmax.entropy_error * kept),
    }


def stored(result: Bounded, dtype: torch.dtype) -> Bounded:
    """The result after one rounding to `dtype`."""
    rounding = BF16_ROUNDING if dtype == torch.bfloat16 else UNIT
    return Bounded(result.value, result.allowed + rounding * np.abs(result.value))


def is_among(num_tokens: int, rows: Tensor | None) -> np.ndarray:
    """[T] bool: the tokens that take part."""
    if rows is None:
        return np.ones(num_tokens, bool)
    return np.isin(np.arange(num_tokens), array(rows))


def array(tensor: Tensor) -> np.ndarray:
    """On the host; floating dtypes as float64."""
    values = tensor.detach().cpu()
    result: np.ndarray = (values.double() if values.is_floating_point() else values).numpy()
    return result


def check(results: Mapping[str, Tensor], plain: Mapping[str, Tensor] | None, truth: Truth) -> None:
    """The measure. `plain`: the results of torch on the same inputs; None grants no error for it.

    Where ours is float32 and torch's is bfloat16, nothing is granted either.
    """
    assert results.keys() == truth.keys()
    for name, true in truth.items():
        got = array(results[name])
        assert got.shape == true.value.shape, f"{name}: {got.shape} is not {true.value.shape}"
        error, granted = _error(got, true.value), np.zeros_like(got)
        if plain is not None and plain[name].dtype == results[name].dtype:
            granted = np.nan_to_num(_error(array(plain[name]), true.value), posinf=0.0)
        is_good = error <= granted + true.allowed  # False for NaN
        if not is_good.all():
            worst = np.unravel_index(np.argmin(is_good), error.shape)
            raise AssertionError(
                f"{name}{list(map(int, worst))}: {got[worst]}, not {true.value[worst]}; allowed is "
                f"{true.allowed[worst]} beside torch's {granted[worst]}"
            )


def _product(gradient: Bounded, factor: np.ndarray) -> Bounded:
    size = np.abs(gradient.value) @ np.abs(factor)
    allowed = gradient.allowed @ np.abs(factor) + DOT_ROUNDINGS * UNIT * size
    return Bounded(gradient.value @ factor, allowed)


def _error(got: np.ndarray, true: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # -inf where -inf is expected is no error
        return np.where(got == true, 0.0, np.abs(got - true))


def _finite(values: np.ndarray) -> np.ndarray:
    """-inf as 0: such an entry has probability 0 and takes no part."""
    return np.where(np.isneginf(values), 0.0, values)
