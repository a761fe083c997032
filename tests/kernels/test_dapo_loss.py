"""dapo_loss: its branches one by one, and loss, gradient and statistics against float64 numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import plain_torch
import pytest
import torch
from kernel_backends import torch_alone
from kernel_draws import RULE, draw_tokens, stats_of
from logprob_truth import array, check
from loss_truth import LossTruth, loss_truth
from torch import Tensor

from dapo_kernels import DapoLossStats, dapo_loss

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
COUNTS = ("clipped_high", "clipped_low", "dual_clipped")
Tokens = dict[str, Tensor | None]


def draw(num_tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tokens:
    """Every branch is taken; every sixth token does not train. With logprobs and entropy."""
    generator = np.random.default_rng(seed + 100)
    logprobs = np.float32(-generator.exponential(1.0, num_tokens))
    tokens = draw_tokens(logprobs.astype(np.float64), seed=seed)
    entropy = np.float32(generator.exponential(1.0, num_tokens))
    tokens["logprobs"], tokens["entropy"] = map(torch.from_numpy, (logprobs, entropy))
    return {name: value.to(dtype) for name, value in tokens.items() if value is not None}


def run(tokens: Tokens, device: str, **rule: Any) -> tuple[Tensor, Tensor, DapoLossStats]:
    """Loss, gradient of the log-probs, statistics."""
    here = {name: None if v is None else v.to(device) for name, v in tokens.items()}
    here["logprobs"] = tokens["logprobs"].detach().to(device, copy=True).requires_grad_()
    loss, stats = dapo_loss(**{"old_logprobs": None, **here}, **rule)
    loss.backward()
    gradient = here["logprobs"].grad
    assert gradient is not None
    return loss.detach().cpu(), gradient.cpu(), stats


def truth_of(tokens: Tokens, **rule: Any) -> LossTruth:
    columns = {name: None if value is None else array(value) for name, value in tokens.items()}
    return loss_truth(**{"old_logprobs": None, **columns}, **rule)


def check_all(tokens: Tokens, device: str, **rule: Any) -> None:
    loss, gradient, stats = run(tokens, device, **rule)
    truth = truth_of(tokens, **rule)
    check({"loss": loss, "grad": gradient}, None, {"loss": truth.loss, "grad": truth.slope})
    check(stats_of(stats, truth.statistics), None, truth.statistics)


OPTIONS = [
    pytest.param({**CLIP}, id="clip-higher"),
    pytest.param({"clip_low": 0.25, "clip_high": 0.25}, id="symmetric"),
    pytest.param({**CLIP, "dual_clip": 3.0}, id="dual-clip"),
    pytest.param({**CLIP, "importance_cap": 1.2}, id="small-cap"),
    pytest.param(RULE, id="everything"),
]
LEFT_OUT = [
    pytest.param((), id="all-inputs"),
    pytest.param(("rollout_logprobs",), id="no-rollout"),
    pytest.param(("rollout_logprobs", "ref_logprobs"), id="no-reference"),
    pytest.param(("old_logprobs",), id="no-old"),
    pytest.param(("old_logprobs", "rollout_logprobs", "ref_logprobs", "entropy"), id="bare"),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("names", LEFT_OUT)
def test_as_exact_as_float32_can_be(
    device: str, options: dict[str, float], names: tuple[str, ...]
) -> None:
    tokens = {name: value for name, value in draw(400).items() if name not in names}
    if "ref_logprobs" in names:
        options = {**options, "kl_coef": 0.0}
    check_all(tokens, device, **options)


@pytest.mark.parametrize("num_tokens", [1, 511, 512, 513, 1025])
def test_any_number_of_tokens(device: str, num_tokens: int) -> None:
    """One, and around the blocks of 512 of a program."""
    check_all(draw(num_tokens), device, **RULE)


@pytest.mark.parametrize("options", OPTIONS)
def test_float64_is_exact(device: str, options: dict[str, float]) -> None:
    """A few hundred summands: 1e-13 is some hundred roundings."""
    tokens = draw(400, torch.float64)
    loss, gradient, _ = run(tokens, device, **options)
    truth = truth_of(tokens, **options)
    np.testing.assert_allclose(loss.numpy(), truth.loss.value, rtol=1e-13, atol=1e-12)
    np.testing.assert_allclose(gradient.numpy(), truth.slope.value, rtol=1e-13, atol=1e-15)


@torch_alone
def test_plain_torch_agrees_with_the_truth() -> None:
    """Two accounts of the formula that share no line."""
    tokens = draw(400, torch.float64)
    del tokens["entropy"]
    leaf = tokens["logprobs"].requires_grad_()
    loss = plain_torch.dapo_loss(**tokens, **RULE)
    loss.backward()
    truth = truth_of({**tokens, "logprobs": leaf.detach()}, **RULE)
    np.testing.assert_allclose(loss.detach().numpy(), truth.loss.value, rtol=1e-13)
    np.testing.assert_allclose(leaf.grad.numpy(), truth.slope.value, rtol=1e-13, atol=1e-15)


# ------------------------------------------------------------------ negative controls


def _clips_swapped(rule: Any) -> Any:
    return replace(rule, clip_low=rule.clip_high, clip_high=rule.clip_low)


def _dual_clip_of_good_tokens(rule: Any) -> Any:
    return replace(rule, dual_clip=rule.dual_clip / 2)


def _cap_forgotten(rule: Any) -> Any:
    return replace(rule, importance_cap=1e6)


def _kl_forgotten(rule: Any) -> Any:
    return replace(rule, kl_coef=0.0)


@pytest.mark.parametrize(
    "wrong", [_clips_swapped, _dual_clip_of_good_tokens, _cap_forgotten, _kl_forgotten]
)
def test_wrong_kernels_do_not_pass(
    device: str, ops: Any, wrong: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = draw(400)
    check_all(tokens, device, **RULE)
    right = ops.token_losses
    monkeypatch.setattr(
        ops, "token_losses", lambda logprobs, tokens, rule: right(logprobs, tokens, wrong(rule))
    )
    loss, gradient, _ = run(tokens, device, **RULE)
    truth = truth_of(tokens, **RULE)
    with pytest.raises(AssertionError, match="loss"):
        check({"loss": loss}, None, {"loss": truth.loss})
    with pytest.raises(AssertionError, match="grad"):
        check({"grad": gradient}, None, {"grad": truth.slope})


@pytest.mark.parametrize("name", COUNTS)
def test_wrong_counts_do_not_pass(device: str, name: str) -> None:
    tokens = draw(400)
    truth = truth_of(tokens, **RULE).statistics[name]
    assert truth.value > 0
    got = getattr(run(tokens, device, **RULE)[2], name)
    with pytest.raises(AssertionError, match=name):
        check({name: got + 1}, None, {name: truth})


# ------------------------------------------------------------------ branch by branch, by hand

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
    pytest.param(2.0, -25.0, -2.0 * math.exp(-20), 0.0, (0, 0, 0), id="ratio-vanishes"),
    pytest.param(0.0, math.log(4.0), 0.0, 0.0, (0, 0, 0), id="no-advantage"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("advantage", "logratio", "loss", "slope", "counts"), TOKENS)
def test_each_branch(
    device: str,
    advantage: float,
    logratio: float,
    loss: float,
    slope: float,
    counts: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    tokens = one_token(-1.0 + logratio, -1.0, advantage, dtype)
    value, gradient, stats = run(tokens, device, **CLIP, dual_clip=3.0)
    # -1 + logratio is rounded: 2^-23 of up to 26, relatively in the ratio.
    exactness = 4e-6 if dtype == torch.float32 else 1e-12
    assert value.item() == pytest.approx(loss, rel=exactness)
    assert gradient.item() == pytest.approx(slope, rel=exactness)
    assert tuple(int(getattr(stats, name)) for name in COUNTS) == counts


@pytest.mark.parametrize(
    ("mismatch", "weight", "capped"),
    [
        pytest.param(0.5, math.exp(0.5), 0, id="below"),
        pytest.param(1.0, 2.0, 1, id="above"),
        pytest.param(90.0, 2.0, 1, id="overflows"),
        pytest.param(-90.0, math.exp(-20.0), 0, id="vanishes"),
    ],
)
def test_importance_weight(device: str, mismatch: float, weight: float, capped: int) -> None:
    """exp(old - rollout), at most the cap; it multiplies loss and gradient alike."""
    tokens = one_token(-1.0, -1.0, 3.0)
    tokens["rollout_logprobs"] = torch.tensor([-1.0 - mismatch])
    value, gradient, stats = run(tokens, device, **CLIP)
    assert value.item() == pytest.approx(-3.0 * weight, rel=4e-6)
    assert gradient.item() == pytest.approx(-3.0 * weight, rel=4e-6)
    assert float(stats.importance_sum) == pytest.approx(weight, rel=4e-6)
    assert int(stats.importance_capped) == capped


def test_huge_ratio_of_a_bad_token_is_bounded_without_dual_clip(device: str) -> None:
    value, gradient, _ = run(one_token(30.0, -0.5, -1.0), device, **CLIP)
    assert value.item() == pytest.approx(math.exp(20.0), rel=4e-6)
    assert gradient.item() == 0.0


@pytest.mark.parametrize("sign", [1, -1])
def test_reference_far_away_stays_finite(device: str, sign: int) -> None:
    tokens = {**one_token(-40.0 - 30 * sign, -40.0 - 30 * sign, 1.0)}
    tokens["ref_logprobs"] = torch.tensor([-40.0])
    value, gradient, stats = run(tokens, device, **CLIP, kl_coef=1.0)
    kl = math.expm1(20.0 * sign) - 20.0 * sign
    assert float(stats.kl_sum) == pytest.approx(kl, rel=4e-6)
    assert value.item() == pytest.approx(kl - 1.0, rel=4e-6)
    assert gradient.item() == pytest.approx(-1.0, rel=4e-6)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 0.05, 1.0], ids=str)
def test_reference_close_by(device: str, scale: float) -> None:
    """k3 is half the square of a small distance, which is a small part of its terms."""
    tokens = draw(64)
    step = scale * torch.linspace(-1, 1, 64)
    tokens["ref_logprobs"] = tokens["logprobs"] + step
    tokens["token_weights"] = torch.ones(64)
    check_all(tokens, device, **RULE)
    _, _, stats = run(tokens, device, **RULE)
    exact = (tokens["ref_logprobs"].double() - tokens["logprobs"].double()).numpy()
    kl = (np.expm1(exact) - exact).sum()
    assert float(stats.kl_sum) == pytest.approx(kl, rel=0.01)


def one_token(
    logprob: float, old: float, advantage: float, dtype: torch.dtype = torch.float32
) -> Tokens:
    return {
        "logprobs": torch.tensor([logprob], dtype=dtype),
        "old_logprobs": torch.tensor([old], dtype=dtype),
        "advantages": torch.tensor([advantage], dtype=dtype),
        "token_weights": torch.ones(1, dtype=dtype),
    }


# ------------------------------------------------------------------ tokens that do not train


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "where",
    ["logprobs", "old_logprobs", "advantages", "rollout_logprobs", "ref_logprobs", "entropy"],
)
def test_token_of_zero_weight_is_not_there(device: str, where: str, poison: float) -> None:
    """Not a bit of loss, gradient or statistics changes."""
    tokens = draw(60)
    skipped = tokens["token_weights"] == 0
    assert skipped.any()
    loss, gradient, stats = run(tokens, device, **RULE)
    tokens[where] = torch.where(skipped, poison, tokens[where])
    poisoned_loss, poisoned_gradient, poisoned_stats = run(tokens, device, **RULE)
    assert torch.equal(poisoned_loss, loss)
    assert torch.equal(poisoned_gradient, gradient)
    assert (poisoned_gradient[skipped] == 0).all()
    for name in truth_of(tokens, **RULE).statistics:
        assert torch.equal(getattr(stats, name), getattr(poisoned_stats, name)), name


@pytest.mark.parametrize("where", ["logprobs", "old_logprobs", "advantages", "rollout_logprobs"])
def test_nan_of_a_trained_token_is_not_hidden(device: str, where: str) -> None:
    tokens = draw(10)
    tokens["token_weights"][:] = 1.0
    tokens[where][4] = math.nan
    loss, gradient, _ = run(tokens, device, **RULE)
    assert loss.isnan()
    assert gradient[4].isnan()
    assert gradient[torch.arange(10) != 4].isfinite().all()


def test_no_token(device: str) -> None:
    loss, gradient, stats = run({name: v[:0] for name, v in draw(5).items()}, device, **RULE)
    assert loss.item() == 0.0
    assert gradient.shape == (0,)
    assert float(stats.tokens) == float(stats.ratio_max_diff) == 0.0


def test_before_the_first_update_the_gradient_is_the_advantage(device: str) -> None:
    tokens = draw(50)
    del tokens["rollout_logprobs"], tokens["ref_logprobs"]
    tokens["old_logprobs"] = tokens["logprobs"]
    _, gradient, stats = run(tokens, device, **CLIP)
    assert torch.equal(gradient, -(tokens["token_weights"] * tokens["advantages"]))
    assert float(stats.ratio_max_diff) == 0.0
    tokens["old_logprobs"] = None
    assert torch.equal(run(tokens, device, **CLIP)[1], gradient)


def test_repeated_calls_give_the_same_bits(device: str) -> None:
    tokens = draw(3000)
    first, second = run(tokens, device, **RULE), run(tokens, device, **RULE)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    for name in truth_of(tokens, **RULE).statistics:
        assert torch.equal(getattr(first[2], name), getattr(second[2], name)), name


def test_gradient_scales_with_the_upstream(device: str) -> None:
    tokens = draw(30)
    here = {name: value.to(device) for name, value in tokens.items()}
    leaf = here["logprobs"].clone().requires_grad_()
    (-3 * dapo_loss(**{**here, "logprobs": leaf}, **RULE)[0]).backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad.cpu(), -3 * run(tokens, device, **RULE)[1])


def test_micro_batches_add_up(device: str) -> None:
    """Loss, gradients and all statistics but the largest, however the tokens are cut."""
    tokens = draw(700)
    truth = truth_of(tokens, **RULE)
    pieces = [
        run({name: value[part] for name, value in tokens.items()}, device, **RULE)
        for part in (slice(0, 1), slice(1, 520), slice(520, 700))
    ]
    loss, gradient = sum(p[0] for p in pieces), torch.cat([p[1] for p in pieces])
    check({"loss": loss, "grad": gradient}, None, {"loss": truth.loss, "grad": truth.slope})
    for name, true in truth.statistics.items():
        values = [getattr(stats, name) for *_, stats in pieces]
        total = max(values) if name == "ratio_max_diff" else torch.stack(values).sum()
        check({name: total}, None, {name: true})
