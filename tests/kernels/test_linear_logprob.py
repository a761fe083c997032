"""linear_logprob against numpy in float64, beside plain torch in the same dtype.

The measure is that of Cut Cross-Entropy: an element's error may not exceed the error plain torch
makes in the same dtype at that element, plus what float32 arithmetic itself may lose (`Truth`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dapo_kernels import linear_logprob, logprob, reference

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
        hidden, weight = self._leaves()
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
        hidden, weight = self._leaves()
        logprobs, entropy = reference.linear_logprob(
            hidden,
            weight,
            self.token_ids,
            temperature=self.temperature,
            valid_vocab=self.valid_vocab,
        )
        return self._with_gradients(hidden, weight, logprobs, entropy)

    def _leaves(self) -> tuple[Tensor, Tensor]:
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


CASES = [
    pytest.param(1, 8, 5, 5, 2048, id="one-token"),
    pytest.param(7, 16, 33, 33, 3, id="chunk-divides-nothing"),
    pytest.param(64, 64, 264, 250, 16, id="padded-vocabulary"),
    pytest.param(130, 48, 1187, 1187, 64, id="prime-vocabulary"),
    pytest.param(40, 128, 32, 31, 2048, id="small-vocabulary-one-chunk"),
    pytest.param(9, 8, 4, 1, 4, id="only-one-real-token"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "size", "rows", "valid", "chunk"), CASES)
def test_no_worse_than_torch(
    num_tokens: int, size: int, rows: int, valid: int, chunk: int, dtype: torch.dtype
) -> None:
    inputs = draw(num_tokens, size, rows, valid=valid, dtype=dtype)
    results = inputs.run(chunk_tokens=chunk)
    assert_no_worse_than_torch(results, inputs.run_plain_torch(), Truth(inputs))
    assert results[0].dtype == results[1].dtype == torch.float32
    assert results[2].dtype == results[3].dtype == dtype


def test_bfloat16_values_need_no_allowance_for_torch() -> None:
    """Logits are float32 inside: the log-probs are as exact as from float32 inputs."""
    inputs = draw(64, 64, 264, valid=250, dtype=torch.bfloat16)
    truth = Truth(inputs)
    ours, plain = (np.abs(r[0].double().numpy() - truth.values[0]) for r in both(inputs))
    assert (ours <= truth.allowed[0]).all()
    assert plain.mean() > 100 * ours.mean()


def both(inputs: Inputs) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return inputs.run(), inputs.run_plain_torch()


def _one_column_too_many(inputs: Inputs) -> tuple[Tensor, ...]:
    inputs.valid_vocab += 1
    return inputs.run()


def _one_column_too_few(inputs: Inputs) -> tuple[Tensor, ...]:
    inputs.token_ids = inputs.token_ids.clamp(max=inputs.valid_vocab - 2)
    inputs.valid_vocab -= 1
    return inputs.run()


def _logits_in_bfloat16(inputs: Inputs) -> tuple[Tensor, ...]:
    inputs.hidden, inputs.weight = inputs.hidden.bfloat16(), inputs.weight.bfloat16()
    return inputs.run()


def _gradient_without_temperature(inputs: Inputs) -> tuple[Tensor, ...]:
    logprobs, entropy, grad_hidden, grad_weight = inputs.run()
    return logprobs, entropy, grad_hidden * inputs.temperature, grad_weight


def _upstream_averaged(inputs: Inputs) -> tuple[Tensor, ...]:
    inputs.upstream = torch.full_like(inputs.upstream, float(inputs.upstream.mean()))
    return inputs.run()


@pytest.mark.parametrize(
    "wrong",
    [
        _one_column_too_many,
        _one_column_too_few,
        _logits_in_bfloat16,
        _gradient_without_temperature,
        _upstream_averaged,
    ],
)
def test_the_measure_rejects_wrong_results(wrong: Callable[[Inputs], tuple[Tensor, ...]]) -> None:
    inputs = draw(64, 64, 264, valid=250)
    inputs.token_ids.clamp_(max=248)
    plain, truth = inputs.run_plain_torch(), Truth(inputs)
    assert_no_worse_than_torch(inputs.run(), plain, truth)
    with pytest.raises(AssertionError, match=r"logprobs|grad"):
        assert_no_worse_than_torch(wrong(inputs), plain, truth)


def test_gradcheck() -> None:
    inputs = draw(6, 5, 8, valid=7, dtype=torch.float64)

    def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_logprob(
            hidden,
            weight,
            inputs.token_ids,
            temperature=0.7,
            vocab_start=0,
            valid_vocab=7,
            group=None,
            chunk_tokens=4,
        )[0]

    assert torch.autograd.gradcheck(logprobs, inputs._leaves())


def test_shift_of_all_logits_changes_nothing() -> None:
    """Multiples of 1/16 keep logits exact in float32 even at -1000: the bits must agree."""
    inputs = draw(20, 16, 50, temperature=1.0)
    inputs.hidden = (inputs.hidden * 4).round() / 4
    inputs.weight = (inputs.weight * 4).round() / 4
    plain = inputs.run()
    inputs.hidden[:, 0], inputs.weight[:, 0] = 1.0, inputs.weight[:, 0] * 0
    centered = inputs.run()
    for shift in (-1000.0, 1000.0):
        inputs.weight[:, 0] = shift
        shifted = inputs.run()
        assert torch.equal(shifted[0], centered[0])
        assert torch.equal(shifted[1], centered[1])
        # Column 0 of these gradients is the shift itself times a sum that is 0 but for rounding.
        assert torch.equal(shifted[2][:, 1:], centered[2][:, 1:])
        assert torch.equal(shifted[3], centered[3])
    assert not torch.equal(plain[0], centered[0])


def test_padding_rows_take_no_part() -> None:
    inputs = draw(12, 16, 40, valid=33)
    before = inputs.run()
    inputs.weight[33:] = 1e4
    after = inputs.run()
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert (after[3][33:] == 0).all()
    inputs.valid_vocab = 40
    assert not torch.equal(before[0], inputs.run()[0])


@pytest.mark.parametrize("probability", [0.99, 0.999, 0.9999])
def test_gradient_of_a_confident_token(probability: float) -> None:
    """1 - p must not be formed from a rounded p: in bfloat16 nothing is left of it at 0.999."""
    hidden = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    logit = torch.tensor(np.log(probability / (1 - probability))).bfloat16()
    weight = torch.stack((logit, torch.zeros_like(logit)))[:, None].requires_grad_()
    logprobs, _ = linear_logprob(
        hidden, weight, torch.tensor([0]), temperature=1.0, vocab_start=0, valid_vocab=2, group=None
    )
    logprobs.sum().backward()
    true = 1 / (1 + np.exp(float(logit)))
    stored, summed = 2.0**-9, UNIT * ROUNDINGS / true
    assert weight.grad is not None
    assert float(weight.grad[0, 0]) == pytest.approx(true, rel=stored + summed)
    assert float(weight.grad[1, 0]) == pytest.approx(-true, rel=stored + summed)
    rounded = float(1 - torch.tensor(1 - true).bfloat16())
    assert rounded != pytest.approx(true, rel=stored + summed)


def test_scoring_gives_the_bits_of_training() -> None:
    """Else the ratio before the first update would not be exactly 1."""
    inputs = draw(50, 32, 70, dtype=torch.bfloat16)
    logprobs, entropy, *_ = inputs.run(chunk_tokens=16)
    with torch.no_grad():
        scored, scored_entropy = linear_logprob(
            *inputs._leaves(),
            inputs.token_ids,
            temperature=0.7,
            vocab_start=0,
            valid_vocab=70,
            group=None,
            chunk_tokens=16,
        )
    assert torch.equal(scored, logprobs)
    assert torch.equal(scored_entropy, entropy)
    assert not scored.requires_grad


def test_repeated_calls_give_the_same_bits() -> None:
    inputs = draw(50, 32, 70)
    assert all(torch.equal(x, y) for x, y in zip(inputs.run(), inputs.run(), strict=True))


class _LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_all_logits_never_exist() -> None:
    inputs = draw(96, 8, 500)
    with _LargestTensor() as seen:
        inputs.run(chunk_tokens=8)
    assert seen.numel == 8 * 500
    with _LargestTensor() as seen:
        inputs.run_plain_torch()
    assert seen.numel == 96 * 500


def test_no_token() -> None:
    inputs = draw(0, 8, 5)
    logprobs, entropy, grad_hidden, grad_weight = inputs.run()
    assert logprobs.shape == entropy.shape == (0,)
    assert grad_hidden.shape == (0, 8)
    assert torch.equal(grad_weight, torch.zeros(5, 8))


def test_all_tokens_without_gradient() -> None:
    inputs = draw(10, 8, 5)
    inputs.upstream.zero_()
    _, _, grad_hidden, grad_weight = inputs.run()
    assert torch.equal(grad_hidden, torch.zeros(10, 8))
    assert torch.equal(grad_weight, torch.zeros(5, 8))


@pytest.mark.parametrize("outside", [-100, -1, 33, 39, 2**40], ids=str)
def test_id_outside_the_vocabulary(outside: int) -> None:
    """Log-prob -inf, no gradient; other tokens are not touched."""
    inputs = draw(8, 16, 40, valid=33)
    inputs.upstream = torch.linspace(-1, 2, 8)
    inputs.token_ids[3] = outside
    results = inputs.run()
    assert results[0][3] == -torch.inf
    assert (results[2][3] == 0).all()
    kept = [0, 1, 2, 4, 5, 6, 7]
    inputs.token_ids[3], inputs.upstream[3] = 0, 0.0
    others = inputs.run()
    assert torch.equal(results[0][kept], others[0][kept])
    assert torch.equal(results[3], others[3])


def test_banned_rows_of_minus_infinity() -> None:
    """A logit of -inf has probability 0 and no gradient; as a target it has log-prob -inf."""
    inputs = draw(6, 4, 9)
    inputs.hidden.abs_()
    inputs.token_ids = torch.tensor([0, 1, 2, 3, 4, 8])
    without = Inputs(
        inputs.hidden[:5], inputs.weight[:8], inputs.token_ids[:5], inputs.upstream[:5], 0.7, 8
    )
    inputs.weight[8] = -torch.inf
    logprobs, entropy, *_ = inputs.run()
    expected = Truth(without)
    np.testing.assert_array_less(np.abs(logprobs[:5] - expected.values[0]), expected.allowed[0])
    np.testing.assert_array_less(np.abs(entropy[:5] - expected.values[1]), expected.allowed[1])
    assert logprobs[5] == -torch.inf


def test_row_of_nothing_but_minus_infinity() -> None:
    inputs = draw(2, 4, 3)
    inputs.hidden.abs_()
    inputs.weight.fill_(-torch.inf)
    logprobs, entropy, *_ = inputs.run()
    assert (logprobs == -torch.inf).all()
    assert (entropy == 0).all()


def test_logprob_is_never_positive() -> None:
    inputs = draw(500, 16, 2, temperature=0.05)
    logprobs, entropy, *_ = inputs.run()
    assert (logprobs <= 0).all()
    assert (entropy >= 0).all()


def test_frozen_inputs_get_no_gradient() -> None:
    inputs = draw(5, 4, 6)
    for frozen in (0, 1):
        leaves = list(inputs._leaves())
        leaves[frozen].requires_grad_(False)
        logprobs, entropy = linear_logprob(
            *leaves, inputs.token_ids, temperature=1, vocab_start=0, valid_vocab=6, group=None
        )
        logprobs.sum().backward()
        assert leaves[frozen].grad is None
        assert leaves[1 - frozen].grad is not None
        assert not entropy.requires_grad


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden": torch.zeros(4, 6).t()}, r"hidden must be a contiguous .* strides \(1, 6\)"),
        ({"weight": torch.zeros(4, 9).t()}, "weight must be a contiguous"),
        ({"weight": torch.zeros(9, 4, dtype=torch.float64)}, "must agree"),
        ({"weight": torch.zeros(9, 5)}, "must agree"),
        ({"token_ids": torch.zeros(6, dtype=torch.int32)}, r"int64 \[6\]"),
        ({"token_ids": torch.zeros(5, dtype=torch.int64)}, r"int64 \[6\]"),
        ({"vocab_start": 9}, "vocab_start is 9 on rank 0 of 1, expected .* 0"),
        ({"valid_vocab": 10}, "valid_vocab is 10, expected 1 to 9"),
        ({"valid_vocab": 0}, "valid_vocab is 0"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"chunk_tokens": 0}, "chunk_tokens = 0"),
    ],
)
def test_refused_with_a_sentence(change: dict[str, object], sentence: str) -> None:
    arguments: dict[str, object] = {
        "hidden": torch.zeros(6, 4),
        "weight": torch.zeros(9, 4),
        "token_ids": torch.zeros(6, dtype=torch.int64),
        "temperature": 1.0,
        "vocab_start": 0,
        "valid_vocab": 9,
        "group": None,
    }
    linear_logprob(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=sentence):
        linear_logprob(**{**arguments, **change})  # type: ignore[arg-type]


def test_statistics_combine_over_shards_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pure part of vocab parallelism, shards looped over in one process; one shard is empty."""
    inputs = draw(30, 16, 40, valid=33, dtype=torch.float64)
    plan = logprob._plan(inputs.hidden, inputs.weight, 0.7, 0, 33, None, 2048)
    pieces = []
    for start in (0, 10, 20, 30, 40):
        shard = logprob._Plan(
            inverse_temperature=plan.inverse_temperature,
            vocab_start=start,
            num_valid=min(max(33 - start, 0), 10),
            group=None,
            chunk_tokens=7,
            dtype=torch.float64,
        )
        monkeypatch.setattr(logprob, "_combine", lambda statistics: statistics)
        rows = inputs.weight[start : start + 10]
        pieces.append(logprob._forward(inputs.hidden, rows, inputs.token_ids, shard))
        monkeypatch.undo()
    together = logprob._combine(torch.cat(pieces))
    truth = Truth(inputs)
    np.testing.assert_allclose(together[0].numpy(), truth.values[0], rtol=1e-13)
    np.testing.assert_allclose(together[1].numpy(), truth.values[1], rtol=1e-12)
    wrong = torch.cat(pieces)
    wrong[..., 0] = wrong[..., 0].clamp_min(0.0)
    assert not np.allclose(logprob._combine(wrong)[0].numpy(), truth.values[0])
