"""Random inputs for the kernels, and one call of ours or of plain torch on them.

Inputs and results live on the host; a run takes them to a device and back.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import plain_torch
import torch
from logprob_truth import Truth, linear_softmax, linear_truth, logprob_truth
from loss_truth import linear_dapo_truth
from torch import Tensor

from dapo_kernels import DapoLossStats, dapo_loss, linear_dapo_loss, linear_logprob, logprob

Results = dict[str, Tensor]
T = TypeVar("T", Tensor, Tensor | None)


@dataclass
class LogitsInputs:
    logits: Tensor
    token_ids: Tensor
    grad_logprobs: Tensor
    grad_entropy: Tensor
    temperature: float
    valid_vocab: int
    keep: Tensor | None = None

    def run(self, device: str, **options: Any) -> Results:
        leaf = self.logits.to(device, copy=True).requires_grad_()
        logprobs, entropy = logprob(
            leaf.clone(),  # the gradient overwrites it
            self.token_ids.to(device),
            temperature=self.temperature,
            valid_vocab=self.valid_vocab,
            keep=_to(self.keep, device),
            **options,
        )
        self._backward(logprobs, entropy)
        return _results(logprobs=logprobs, entropy=entropy, grad_logits=leaf.grad)

    def run_plain(self, device: str) -> Results:
        leaf = self.logits.to(device, copy=True).requires_grad_()
        logprobs, entropy = plain_torch.logprob(
            leaf,
            self.token_ids.to(device),
            temperature=self.temperature,
            valid_vocab=self.valid_vocab,
        )
        self._backward(logprobs, entropy)
        return _results(logprobs=logprobs, entropy=entropy, grad_logits=leaf.grad)

    def truth(self) -> Truth:
        return logprob_truth(**vars(self))

    def _backward(self, *outputs: Tensor) -> None:
        gradients = (self.grad_logprobs, self.grad_entropy)
        torch.autograd.backward(
            outputs, [g.to(o.device, o.dtype) for g, o in zip(gradients, outputs, strict=True)]
        )


@dataclass
class LinearInputs:
    hidden: Tensor
    weight: Tensor
    token_ids: Tensor
    grad_logprobs: Tensor
    grad_entropy: Tensor
    temperature: float
    valid_vocab: int
    rows: Tensor | None = None

    def run(self, device: str, **options: Any) -> Results:
        hidden, weight = self.leaves(device)
        logprobs, entropy = linear_logprob(
            hidden, weight, self.token_ids.to(device), **self.options(device), **options
        )
        self._backward(logprobs, entropy)
        return _results(
            logprobs=logprobs, entropy=entropy, grad_hidden=hidden.grad, grad_weight=weight.grad
        )

    def run_plain(self, device: str) -> Results:
        hidden, weight = self.leaves(device)
        logprobs, entropy = plain_torch.linear_logprob(
            hidden,
            weight,
            self.token_ids.to(device),
            temperature=self.temperature,
            valid_vocab=self.valid_vocab,
        )
        self._backward(logprobs, entropy)
        return _results(
            logprobs=logprobs, entropy=entropy, grad_hidden=hidden.grad, grad_weight=weight.grad
        )

    def truth(self, logits_dtype: torch.dtype | None = None) -> Truth:
        return linear_truth(**vars(self), logits_dtype=logits_dtype)

    def leaves(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        hidden, weight = (x.detach().to(device, copy=True) for x in (self.hidden, self.weight))
        return hidden.requires_grad_(), weight.requires_grad_()

    def options(self, device: str = "cpu") -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "valid_vocab": self.valid_vocab,
            "rows": _to(self.rows, device),
        }

    _backward = LogitsInputs._backward


@dataclass
class DapoInputs:
    """Hidden states, and what linear_dapo_loss needs beside them."""

    linear: LinearInputs
    tokens: dict[str, Tensor | None]
    """old_logprobs, rollout_logprobs, advantages, token_weights, ref_logprobs."""
    rule: dict[str, float] = field(default_factory=dict)

    def run(
        self, device: str, main_grad: Tensor | None = None, **options: Any
    ) -> tuple[Results, DapoLossStats]:
        """Under `main_grad` (on the device) that is where the gradient of the weight is."""
        hidden, weight = self.linear.leaves(device)
        if main_grad is not None:
            weight.main_grad = main_grad  # type: ignore[attr-defined]
        loss, stats = linear_dapo_loss(
            hidden,
            weight,
            self.linear.token_ids.to(device),
            **self.tokens_on(device),
            **self.rule,
            **self.linear.options(device),
            **options,
        )
        loss.backward()
        grad_weight = weight.grad if main_grad is None else main_grad
        return _results(loss=loss, grad_hidden=hidden.grad, grad_weight=grad_weight), stats

    def run_composed(self, device: str, **options: Any) -> tuple[Results, DapoLossStats]:
        """linear_logprob, then dapo_loss, joined by autograd."""
        hidden, weight = self.linear.leaves(device)
        logprobs, entropy = linear_logprob(
            hidden,
            weight,
            self.linear.token_ids.to(device),
            **self.linear.options(device),
            **options,
        )
        tokens = self.tokens_on(device)
        if self.linear.rows is not None:
            kept = torch.zeros(len(hidden), dtype=torch.bool)
            kept[self.linear.rows] = True
            tokens["token_weights"] = tokens["token_weights"] * kept.to(device)
        loss, stats = dapo_loss(logprobs, **tokens, entropy=entropy.detach(), **self.rule)
        loss.backward()
        return _results(loss=loss, grad_hidden=hidden.grad, grad_weight=weight.grad), stats

    def run_plain(self, device: str) -> Results:
        hidden, weight = self.linear.leaves(device)
        logprobs, _ = plain_torch.linear_logprob(
            hidden,
            weight,
            self.linear.token_ids.to(device),
            temperature=self.linear.temperature,
            valid_vocab=self.linear.valid_vocab,
        )
        loss = plain_torch.dapo_loss(logprobs, **self.tokens_on(device), **self.rule)
        loss.backward()
        return _results(loss=loss, grad_hidden=hidden.grad, grad_weight=weight.grad)

    def truth(self, logits_dtype: torch.dtype | None = None) -> tuple[Truth, Truth]:
        """(loss, grad_hidden, grad_weight), and the statistics."""
        linear = {k: v for k, v in vars(self.linear).items() if not k.startswith("grad_")}
        return linear_dapo_truth(
            **linear, tokens=self.tokens, logits_dtype=logits_dtype, **self.rule
        )

    def tokens_on(self, device: str) -> dict[str, Any]:
        return {name: _to(value, device) for name, value in self.tokens.items()}

    def without(self, *names: str) -> DapoInputs:
        """Those inputs are None; without a reference no weight on it either."""
        rule = dict(self.rule)
        if "ref_logprobs" in names:
            rule.pop("kl_coef", None)
        return replace(self, tokens={**self.tokens, **dict.fromkeys(names)}, rule=rule)


def draw_logits(
    num_tokens: int,
    num_columns: int,
    *,
    valid: int | None = None,
    dtype: torch.dtype = torch.float32,
    temperature: float = 0.7,
    seed: int = 0,
) -> LogitsInputs:
    """Like a policy's: two rows of three have one likely token, which is often the given one."""
    generator = torch.Generator().manual_seed(seed)
    valid = num_columns if valid is None else valid
    logits = 3 * torch.randn(num_tokens, num_columns, generator=generator)
    token_ids = torch.randint(0, valid, (num_tokens,), generator=generator)
    likely = torch.where(
        torch.rand(num_tokens, generator=generator) < 0.5,
        token_ids,
        torch.randint(0, valid, (num_tokens,), generator=generator),
    )
    height = 12.0 * (torch.rand(num_tokens, generator=generator) < 0.67)
    logits[torch.arange(num_tokens), likely] += height
    grad_logprobs, grad_entropy = draw_upstream(num_tokens, generator)
    return LogitsInputs(
        logits.to(dtype), token_ids, grad_logprobs, grad_entropy, temperature, valid
    )


def draw_linear(
    num_tokens: int,
    size: int,
    num_rows: int,
    *,
    valid: int | None = None,
    dtype: torch.dtype = torch.float32,
    temperature: float = 0.7,
    seed: int = 0,
) -> LinearInputs:
    """Logits of standard deviation 3, that is peaked rows."""
    generator = torch.Generator().manual_seed(seed)
    valid = num_rows if valid is None else valid
    hidden = torch.randn(num_tokens, size, generator=generator)
    weight = torch.randn(num_rows, size, generator=generator) * 3 / size**0.5
    token_ids = torch.randint(0, valid, (num_tokens,), generator=generator)
    grad_logprobs, grad_entropy = draw_upstream(num_tokens, generator)
    return LinearInputs(
        hidden.to(dtype),
        weight.to(dtype),
        token_ids,
        grad_logprobs,
        grad_entropy,
        temperature,
        valid,
    )


def draw_upstream(num_tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Signed and uneven, some of them zero: ones would hide a gradient read as a scalar."""
    grad_logprobs = torch.randn(num_tokens, generator=generator)
    grad_entropy = 0.3 * torch.randn(num_tokens, generator=generator)
    grad_logprobs[2::5] = 0.0
    grad_entropy[2::10] = 0.0
    return grad_logprobs, grad_entropy


RULE = {
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": 3.0,
    "importance_cap": 2.0,
    "kl_coef": 0.05,
}
FAR_LOGRATIOS = (0.0, 0.1, 0.5, -0.1, -0.5, 1.5, -1.5)
LOGRATIOS = (*FAR_LOGRATIOS, 0.215, -0.27)
"""Of logprobs to old: each side of each clip of RULE (0.247, -0.223, 1.099), and away from it, so
that rounding decides no branch; the last two lie between the clips and the clips swapped."""
MISMATCHES = (0.0, 0.3, -0.4, 1.1, -0.1)
"""Of old to rollout: both sides of log importance_cap = 0.693."""


def draw_dapo(
    linear: LinearInputs, *, logratios: tuple[float, ...] = LOGRATIOS, seed: int = 0
) -> DapoInputs:
    """Every branch of the loss around the true log-probs; every sixth token does not train."""
    softmax = linear_softmax(
        linear.hidden,
        linear.weight,
        linear.token_ids,
        temperature=linear.temperature,
        valid_vocab=linear.valid_vocab,
    )
    return DapoInputs(linear, draw_tokens(softmax.logprobs, logratios, seed), dict(RULE))


def draw_tokens(
    logprobs: np.ndarray, logratios: tuple[float, ...] = LOGRATIOS, seed: int = 0
) -> dict[str, Tensor | None]:
    """What stands beside those log-probs in the loss; float32."""
    generator = np.random.default_rng(seed)
    size = len(logprobs)
    old = (logprobs - generator.permutation(np.resize(logratios, size))).astype(np.float32)
    rollout = old - generator.permutation(np.resize(MISMATCHES, size))
    weights = generator.uniform(0.1, 1.0, size)
    weights[5::6] = 0.0
    columns = {
        "old_logprobs": old,
        "rollout_logprobs": rollout,
        "advantages": generator.choice((-1.0, 1.0), size) * generator.uniform(0.2, 2.0, size),
        "token_weights": weights,
        "ref_logprobs": logprobs + generator.normal(0, 0.3, size),
    }
    return {name: torch.from_numpy(np.float32(values)) for name, values in columns.items()}


def stats_of(stats: DapoLossStats, names: Truth) -> Results:
    return {name: getattr(stats, name) for name in names}


def _results(**values: Tensor | None) -> Results:
    found = {}
    for name, value in values.items():
        assert value is not None, f"{name} is missing"
        found[name] = value.detach().cpu()
    return found


def _to(tensor: T, device: str) -> T:
    return None if tensor is None else tensor.to(device)
