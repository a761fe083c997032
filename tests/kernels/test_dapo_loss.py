"""dapo_loss against scalar arithmetic, token by token, and its gradient against the closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dapo_kernels import dapo_loss, reference

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def token_truth(
    logprob: float,
    old: float,
    advantage: float,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
    importance: float = 1.0,
    ref: float | None = None,
    kl_coef: float = 0.0,
) -> tuple[float, float]:
    """Loss of one token of weight 1, and its derivative by the log-prob."""
    logratio = min(max(logprob - old, -20.0), 20.0)
    ratio = math.exp(logratio)
    bounded = min(max(ratio, 1 - clip_low), 1 + clip_high)
    loss, slope = -advantage * ratio, -advantage * ratio
    if -advantage * bounded > loss:
        loss, slope = -advantage * bounded, 0.0
    if dual_clip and advantage < 0 and loss > -dual_clip * advantage:
        loss, slope = -dual_clip * advantage, 0.0
    if abs(logprob - old) > 20:
        slope = 0.0
    loss, slope = loss * importance, slope * importance
    if ref is not None:
        difference = ref - logprob
        loss += kl_coef * (math.exp(difference) - difference - 1)
        slope += kl_coef * (1 - math.exp(difference))
    return loss, slope


def draw(num_tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Log-ratios wide enough that every branch is taken; a fifth of the tokens does not train."""
    generator = np.random.default_rng(seed)
    old = -generator.exponential(1.0, num_tokens)
    weights = generator.uniform(0.1, 1.0, num_tokens) * (generator.random(num_tokens) > 0.2)
    columns = {
        "logprobs": old + generator.normal(0, 0.5, num_tokens),
        "old_logprobs": old,
        "advantages": generator.normal(0, 1.0, num_tokens),
        "token_weights": weights,
        "importance_weights": generator.uniform(0.2, 2.0, num_tokens),
        "ref_logprobs": old + generator.normal(0, 0.3, num_tokens),
    }
    return {name: torch.from_numpy(values) for name, values in columns.items()}


def loss_and_gradient(values: dict[str, Tensor], **options: Any) -> tuple[float, np.ndarray]:
    logprobs = values["logprobs"].clone().requires_grad_()
    loss, _ = dapo_loss(**{**values, "logprobs": logprobs}, **options)
    loss.backward()
    assert logprobs.grad is not None
    return loss.item(), logprobs.grad.numpy()


def all_tokens_truth(values: dict[str, Tensor], **options: Any) -> tuple[float, np.ndarray]:
    v = {name: column.tolist() for name, column in values.items()}
    loss, gradient = 0.0, []
    for t, weight in enumerate(v["token_weights"]):
        value, slope = token_truth(
            v["logprobs"][t],
            v["old_logprobs"][t],
            v["advantages"][t],
            importance=v["importance_weights"][t] if "importance_weights" in v else 1.0,
            ref=v["ref_logprobs"][t] if "ref_logprobs" in v else None,
            **options,
        )
        loss += weight * value
        gradient.append(weight * slope)
    return loss, np.array(gradient)


OPTIONS = [
    pytest.param({**CLIP}, id="clip-higher"),
    pytest.param({"clip_low": 0.2, "clip_high": 0.2}, id="symmetric"),
    pytest.param({**CLIP, "dual_clip": 1.5}, id="dual-clip"),
    pytest.param({**CLIP, "dual_clip": 10.0, "kl_coef": 0.05}, id="everything"),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("left_out", [(), ("importance_weights",), ("importance_weights", "ref")])
def test_equals_the_scalar_truth(options: dict[str, float], left_out: tuple[str, ...]) -> None:
    values = draw(400)
    values = {k: v for k, v in values.items() if not k.startswith(left_out or ("-",))}
    if "ref_logprobs" not in values:
        options = {**options, "kl_coef": 0.0}
    loss, gradient = loss_and_gradient(values, **options)
    true_loss, true_gradient = all_tokens_truth(values, **options)
    # float64, a few hundred summands: 1e-13 is some hundred roundings.
    assert loss == pytest.approx(true_loss, rel=1e-13, abs=1e-12)
    np.testing.assert_allclose(gradient, true_gradient, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"clip_low": 0.28, "clip_high": 0.2}, id="clips-swapped"),
        pytest.param({**CLIP, "dual_clip": 1.5}, id="dual-clip-on"),
    ],
)
def test_truth_rejects_wrong_options(wrong: dict[str, float]) -> None:
    values = draw(400)
    loss, gradient = loss_and_gradient(values, **wrong)
    true_loss, true_gradient = all_tokens_truth(values, **CLIP)
    assert loss != pytest.approx(true_loss, rel=1e-6)
    assert not np.allclose(gradient, true_gradient)


TOKENS = [
    # advantage, log-ratio, loss, derivative, (clipped_high, clipped_low, dual_clipped)
    pytest.param(2.0, 0.0, -2.0, -2.0, (0, 0, 0), id="on-policy"),
    pytest.param(2.0, math.log(1.27), -2.54, -2.54, (0, 0, 0), id="below-clip-high"),
    pytest.param(2.0, math.log(1.5), -2.56, 0.0, (1, 0, 0), id="above-clip-high"),
    pytest.param(2.0, math.log(0.1), -0.2, -0.2, (0, 0, 0), id="good-token-never-cut-below"),
    pytest.param(-2.0, math.log(0.81), 1.62, 1.62, (0, 0, 0), id="above-clip-low"),
    pytest.param(-2.0, math.log(0.5), 1.6, 0.0, (0, 1, 0), id="below-clip-low"),
    pytest.param(-2.0, math.log(1.5), 3.0, 3.0, (0, 0, 0), id="bad-token-not-cut-above"),
    pytest.param(-2.0, math.log(4.0), 6.0, 0.0, (0, 0, 1), id="dual-clip"),
    pytest.param(2.0, 25.0, -2.56, 0.0, (1, 0, 0), id="ratio-overflows-for-a-good-token"),
    pytest.param(0.0, math.log(4.0), 0.0, 0.0, (0, 0, 0), id="no-advantage"),
]


@pytest.mark.parametrize(("advantage", "logratio", "loss", "slope", "counts"), TOKENS)
def test_each_branch(
    advantage: float, logratio: float, loss: float, slope: float, counts: tuple[int, int, int]
) -> None:
    logprobs = torch.tensor([-1.0 + logratio], dtype=torch.float64, requires_grad=True)
    value, stats = dapo_loss(
        logprobs,
        torch.tensor([-1.0], dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        torch.ones(1, dtype=torch.float64),
        **CLIP,
        dual_clip=3.0,
    )
    value.backward()
    assert value.item() == pytest.approx(loss, rel=1e-12)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(slope, rel=1e-12)
    found = (stats.clipped_high, stats.clipped_low, stats.dual_clipped)
    assert tuple(int(count) for count in found) == counts


def test_huge_ratio_of_a_bad_token_is_bounded_without_dual_clip() -> None:
    values = torch.tensor([30.0, -0.5, -1.0, 1.0], dtype=torch.float64).unbind()
    logprobs, old, advantages, weights = (value[None] for value in values)
    logprobs.requires_grad_()
    loss, _ = dapo_loss(logprobs, old, advantages, weights, **CLIP)
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(20.0))
    assert logprobs.grad is not None
    assert logprobs.grad.item() == 0.0


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "where", ["logprobs", "old_logprobs", "advantages", "importance_weights", "ref_logprobs"]
)
def test_token_of_zero_weight_is_not_there(where: str, poison: float) -> None:
    """Not a bit of loss, gradient or statistics changes."""
    options = {**CLIP, "dual_clip": 3.0, "kl_coef": 0.1}
    values = draw(60)
    skipped = values["token_weights"] == 0
    assert skipped.any()
    clean = loss_and_gradient(values, **options)
    clean_stats = dapo_loss(**values, **options)[1]
    values[where] = torch.where(skipped, poison, values[where])
    loss, gradient = loss_and_gradient(values, **options)
    assert loss == clean[0]
    assert np.array_equal(gradient, clean[1])
    assert (gradient[skipped.numpy()] == 0).all()
    assert dapo_loss(**values, **options)[1] == clean_stats


def test_non_finite_trained_token_is_not_hidden() -> None:
    values = draw(10)
    values["token_weights"][:] = 1.0
    values["logprobs"][4] = math.nan
    assert math.isnan(loss_and_gradient(values, **CLIP)[0])


def test_all_tokens_masked() -> None:
    values = draw(10)
    values["token_weights"].zero_()
    values["logprobs"].fill_(math.nan)
    loss, gradient = loss_and_gradient(values, **CLIP)
    assert loss == 0.0
    assert (gradient == 0).all()


def test_no_token() -> None:
    values = {name: column[:0] for name, column in draw(5).items()}
    loss, gradient = loss_and_gradient(values, **CLIP)
    assert loss == 0.0
    assert gradient.shape == (0,)


def test_before_the_first_update_the_gradient_is_the_advantage() -> None:
    values = draw(50)
    del values["importance_weights"], values["ref_logprobs"]
    values["old_logprobs"] = values["logprobs"]
    loss, gradient = loss_and_gradient(values, **CLIP)
    expected = -(values["token_weights"] * values["advantages"]).numpy()
    assert np.array_equal(gradient, expected)
    assert loss == pytest.approx(expected.sum(), rel=1e-13)
    assert dapo_loss(**values, **CLIP)[1].ratio_max_diff == 0


def test_statistics_count_trained_tokens_only() -> None:
    values = draw(400)
    _, stats = dapo_loss(**values, **CLIP, dual_clip=1.5)
    trained = values["token_weights"].numpy() > 0
    ratio = np.exp((values["logprobs"] - values["old_logprobs"]).numpy())[trained]
    advantage = values["advantages"].numpy()[trained]
    difference = (values["ref_logprobs"] - values["logprobs"]).numpy()[trained]
    assert stats.tokens == trained.sum()
    assert stats.clipped_high == ((advantage > 0) & (ratio > 1.28)).sum()
    assert stats.clipped_low == ((advantage < 0) & (ratio < 0.8)).sum()
    assert stats.dual_clipped == ((advantage < 0) & (ratio > 1.5)).sum()
    assert float(stats.kl_sum) == pytest.approx(
        (np.exp(difference) - difference - 1).sum(), rel=1e-6
    )
    assert float(stats.ratio_max_diff) == pytest.approx(np.abs(ratio - 1).max(), rel=1e-6)
    assert min(stats.clipped_high, stats.clipped_low, stats.dual_clipped) > 0


def test_nothing_is_moved_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("moved a value to the host")

    values = draw(20)
    values["logprobs"].requires_grad_()
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, refuse)
    loss, stats = dapo_loss(**values, **CLIP, dual_clip=3.0, kl_coef=0.1)
    loss.backward()
    with pytest.raises(AssertionError, match="host"):
        float(stats.tokens)


@pytest.mark.parametrize("options", OPTIONS)
def test_reference_agrees(options: dict[str, float]) -> None:
    values = draw(100)
    loss, gradient = loss_and_gradient(values, **options)
    logprobs = values["logprobs"].clone().requires_grad_()
    plain = reference.dapo_loss(**{**values, "logprobs": logprobs}, **options)
    plain.backward()
    assert logprobs.grad is not None
    assert plain.item() == pytest.approx(loss, rel=1e-13)
    np.testing.assert_allclose(logprobs.grad.numpy(), gradient, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"advantages": torch.zeros(4)}, r"\[\(5,\), \(5,\), \(4,\), \(5,\)\]"),
        ({"logprobs": torch.zeros(5, 1)}, "must be"),
        ({"importance_weights": torch.zeros(6)}, "must be"),
        ({"ref_logprobs": torch.zeros(6)}, "must be"),
        ({"kl_coef": 0.1}, "kl_coef = 0.1 needs ref_logprobs"),
    ],
)
def test_refused_with_a_sentence(change: dict[str, Any], sentence: str) -> None:
    names = ("logprobs", "old_logprobs", "advantages", "token_weights")
    arguments: dict[str, Any] = {name: torch.zeros(5) for name in names}
    dapo_loss(**arguments, **CLIP)
    with pytest.raises(ValueError, match=sentence):
        dapo_loss(**{**arguments, **change}, **CLIP)
