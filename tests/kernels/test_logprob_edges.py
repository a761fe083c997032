"""linear_logprob where log-prob kernels are known to break: shifts, padding, peaks, infinities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from logprob_truth import ROUNDINGS, UNIT, Inputs, Truth, draw

from dapo_kernels import linear_logprob


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


def test_no_token() -> None:
    inputs = draw(0, 8, 5)
    logprobs, entropy, grad_hidden, grad_weight = inputs.run()
    assert logprobs.shape == entropy.shape == (0,)
    assert grad_hidden.shape == (0, 8)
    assert torch.equal(grad_weight, torch.zeros(5, 8))


def test_overflow_at_a_token_without_gradient_stays_there() -> None:
    """Finite hidden states whose logits overflow; 0 * NaN must not reach the weight."""
    inputs = draw(6, 8, 5)
    inputs.upstream[2] = 0.0
    clean = inputs.run()
    inputs.hidden[2] = 3e38
    results = inputs.run()
    assert not torch.isfinite(results[0][2])
    assert (results[2][2] == 0).all()
    assert torch.equal(results[3], clean[3])


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
        leaves = list(inputs.leaves())
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
