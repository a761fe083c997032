"""linear_dapo_loss: loss, both gradients and statistics against numpy in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_backends import cpu_checks_only, gpu_only, not_interpreted
from kernel_draws import FAR_LOGRATIOS, RULE, DapoInputs, Results, draw_dapo, draw_linear, stats_of
from logprob_truth import Truth, check
from torch import Tensor

from dapo_kernels import linear_dapo_loss

FLOATS = [torch.float32, torch.bfloat16]
CASES = [
    # tokens, hidden size, rows of the weight, real rows, chunk_tokens
    pytest.param(1, 8, 5, 5, 2048, id="one-token"),
    pytest.param(7, 16, 33, 33, 3, id="chunk-divides-nothing"),
    pytest.param(13, 64, 264, 250, 5, id="padded-vocabulary"),
    pytest.param(12, 24, 1187, 1187, 2048, id="prime-vocabulary-one-chunk"),
    pytest.param(3, 8, 4097, 4097, 2, id="one-row-more-than-a-block"),
    pytest.param(400, 48, 1187, 1100, 150, marks=not_interpreted, id="chunks-of-a-tile"),
]


def draw(num_tokens: int, size: int, num_rows: int, valid: int, dtype: torch.dtype) -> DapoInputs:
    return draw_dapo(draw_linear(num_tokens, size, num_rows, valid=valid, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("num_tokens", "size", "num_rows", "valid", "chunk"), CASES)
def test_no_worse_than_torch(
    device: str,
    num_tokens: int,
    size: int,
    num_rows: int,
    valid: int,
    chunk: int,
    dtype: torch.dtype,
) -> None:
    inputs = draw(num_tokens, size, num_rows, valid, dtype)
    (results, stats), (truth, figures) = inputs.run(device, chunk_tokens=chunk), inputs.truth()
    check(results, inputs.run_plain(device), truth)
    check(stats_of(stats, figures), None, figures)
    assert results["loss"].dtype == torch.float32
    assert results["grad_hidden"].dtype == results["grad_weight"].dtype == dtype
    assert (results["grad_weight"][valid:] == 0).all()


LEFT_OUT = [
    pytest.param(("old_logprobs",), id="on-policy"),
    pytest.param(("rollout_logprobs",), id="no-importance-weights"),
    pytest.param(("ref_logprobs",), id="no-reference"),
    pytest.param(("old_logprobs", "rollout_logprobs", "ref_logprobs"), id="advantages-alone"),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("names", LEFT_OUT)
def test_nothing_needs_the_allowance_for_torch(
    device: str, names: tuple[str, ...], dtype: torch.dtype
) -> None:
    inputs = draw(12, 16, 40, 33, dtype).without(*names)
    (results, stats), (truth, figures) = inputs.run(device, chunk_tokens=5), inputs.truth()
    check(results, None, truth)
    check(stats_of(stats, figures), None, figures)


def test_bfloat16_logits_cost_one_rounding_of_them(device: str) -> None:
    linear = draw_linear(12, 16, 40, valid=33, dtype=torch.bfloat16)
    inputs = draw_dapo(linear, logratios=FAR_LOGRATIOS)
    truth, figures = inputs.truth(torch.bfloat16)
    results, stats = inputs.run(device, chunk_tokens=5, logits_dtype=torch.bfloat16)
    check(results, None, truth)
    check(stats_of(stats, figures), None, figures)
    with pytest.raises(AssertionError, match="loss"):
        check(results, None, inputs.truth()[0])


# ------------------------------------------------------------------ negative controls


def _clips_swapped(inputs: DapoInputs, device: str) -> Results:
    swapped = {"clip_low": RULE["clip_high"], "clip_high": RULE["clip_low"]}
    return replace(inputs, rule={**inputs.rule, **swapped}).run(device)[0]


def _dual_clip_off(inputs: DapoInputs, device: str) -> Results:
    return replace(inputs, rule={**inputs.rule, "dual_clip": 0.0}).run(device)[0]


def _importance_not_capped(inputs: DapoInputs, device: str) -> Results:
    return replace(inputs, rule={**inputs.rule, "importance_cap": 20.0}).run(device)[0]


def _importance_forgotten(inputs: DapoInputs, device: str) -> Results:
    return inputs.without("rollout_logprobs").run(device)[0]


def _reference_forgotten(inputs: DapoInputs, device: str) -> Results:
    return inputs.without("ref_logprobs").run(device)[0]


def _old_forgotten(inputs: DapoInputs, device: str) -> Results:
    return inputs.without("old_logprobs").run(device)[0]


def _advantage_averaged(inputs: DapoInputs, device: str) -> Results:
    advantages = inputs.tokens["advantages"]
    mean = torch.full_like(advantages, float(advantages.mean()))
    return replace(inputs, tokens={**inputs.tokens, "advantages": mean}).run(device)[0]


def _mean_over_the_chunk(inputs: DapoInputs, device: str) -> Results:
    results, _ = inputs.run(device)
    return {name: value / len(inputs.linear.hidden) for name, value in results.items()}


def _temperature_forgotten_in_the_gradient(inputs: DapoInputs, device: str) -> Results:
    results, _ = inputs.run(device)
    return {**results, "grad_weight": results["grad_weight"] * inputs.linear.temperature}


WRONG = [
    _clips_swapped,
    _dual_clip_off,
    _importance_not_capped,
    _importance_forgotten,
    _reference_forgotten,
    _old_forgotten,
    _advantage_averaged,
    _mean_over_the_chunk,
    _temperature_forgotten_in_the_gradient,
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_the_measure_rejects_wrong_results(
    device: str, wrong: Callable[[DapoInputs, str], Results], dtype: torch.dtype
) -> None:
    inputs = draw(12, 16, 40, 33, dtype)
    truth: Truth = inputs.truth()[0]
    check(inputs.run(device)[0], None, truth)
    results = wrong(inputs, device)
    for name in truth:
        if name != "grad_weight" and wrong is _temperature_forgotten_in_the_gradient:
            continue
        with pytest.raises(AssertionError, match=name):
            check({name: results[name]}, None, {name: truth[name]})


# ------------------------------------------------------------------ bits


def test_repeated_calls_give_the_same_bits(device: str) -> None:
    inputs = draw(8, 16, 40, 33, torch.bfloat16)
    (first, stats), (second, again) = (inputs.run(device, chunk_tokens=3) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    for name in stats_of(stats, inputs.truth()[1]):
        assert torch.equal(getattr(stats, name), getattr(again, name))


def test_loss_without_gradient_has_the_bits_of_training(device: str) -> None:
    inputs = draw(8, 16, 40, 33, torch.bfloat16)
    results, stats = inputs.run(device, chunk_tokens=3)
    with torch.no_grad():
        loss, again = call(inputs, device, *inputs.linear.leaves(device), chunk_tokens=3)
    assert torch.equal(loss.cpu(), results["loss"])
    assert torch.equal(stats.logratio_sum, again.logratio_sum)
    assert not loss.requires_grad


# ------------------------------------------------------------------ gradients: where and when


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_main_grad_is_written_in_the_forward(device: str, dtype: torch.dtype) -> None:
    """In float32, on top of what is there; backward returns zeros for the weight."""
    inputs = draw(9, 16, 40, 33, dtype)
    hidden, weight = inputs.linear.leaves(device)
    weight.main_grad = torch.full_like(weight, 0.5, dtype=torch.float32)  # type: ignore[attr-defined]
    main_grad: Tensor = weight.main_grad  # type: ignore[attr-defined]
    loss, _ = call(inputs, device, hidden, weight, chunk_tokens=4)
    written = main_grad.clone()
    loss.backward()
    assert torch.equal(main_grad, written)
    assert weight.grad_added_to_main_grad is True  # type: ignore[attr-defined]
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    truth = inputs.truth()[0]["grad_weight"]
    truth.allowed[...] += 2.0**-24  # of the sum with 0.5
    check({"grad_weight": main_grad - 0.5}, None, {"grad_weight": truth})
    assert (main_grad[33:] == 0.5).all()


def test_gradients_scale_with_the_upstream(device: str) -> None:
    inputs = draw(9, 16, 40, 33, torch.float32)
    hidden, weight = inputs.linear.leaves(device)
    loss, _ = call(inputs, device, hidden, weight)
    (-3 * loss).backward()
    once, _ = inputs.run(device)
    for leaf, name in ((hidden, "grad_hidden"), (weight, "grad_weight")):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.cpu(), -3 * once[name], rtol=2.0**-22, atol=0.0)


def scaled_loss(device: str) -> tuple[Tensor, Tensor]:
    inputs = draw(5, 8, 12, 12, torch.float32)
    hidden, weight = inputs.linear.leaves(device)
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    loss, _ = call(inputs, device, hidden, weight)
    return 0.5 * loss, hidden


@cpu_checks_only
def test_upstream_other_than_one_is_refused_after_main_grad(device: str) -> None:
    loss, _ = scaled_loss(device)
    with pytest.raises(ValueError, match=r"upstream gradient is 0.5, expected 1"):
        loss.backward()


@gpu_only
def test_upstream_other_than_one_gives_nan_after_main_grad(device: str) -> None:
    loss, hidden = scaled_loss(device)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.isnan().all()


def test_second_backward_is_refused(device: str) -> None:
    inputs = draw(5, 8, 12, 12, torch.float32)
    loss, _ = call(inputs, device, *inputs.linear.leaves(device))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_dapo_loss: a second backward"):
        loss.backward()


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
def test_frozen_inputs_get_no_gradient(device: str, frozen: int) -> None:
    inputs = draw(9, 16, 40, 33, torch.float32)
    leaves = inputs.linear.leaves(device)
    leaves[frozen].requires_grad_(False)
    main_grad = torch.zeros(40, 16, device=device)
    if frozen:
        leaves[1].main_grad = main_grad  # type: ignore[attr-defined]
    loss, _ = call(inputs, device, *leaves)
    loss.backward()
    assert leaves[frozen].grad is None
    gradient = leaves[1 - frozen].grad
    assert gradient is not None
    name = ("grad_weight", "grad_hidden")[frozen]
    assert torch.equal(gradient.cpu(), inputs.run(device)[0][name])
    assert (main_grad == 0).all()


@pytest.mark.parametrize(
    "rows", [[0, 2, 3, 7, 8, 10], [6, 1], []], ids=["some", "unordered", "none"]
)
def test_rows_that_take_part(device: str, rows: list[int]) -> None:
    inputs = draw(11, 16, 33, 30, torch.float32)
    inputs.linear.rows = torch.tensor(rows, dtype=torch.int64)
    left_out = ~torch.isin(torch.arange(11), inputs.linear.rows)
    truth, figures = inputs.truth()
    inputs.linear.hidden[left_out] = torch.nan
    results, stats = inputs.run(device, chunk_tokens=4)
    check(results, None, truth)
    check(stats_of(stats, figures), None, figures)
    assert (results["grad_hidden"][left_out] == 0).all()


def call(
    inputs: DapoInputs, device: str, hidden: Tensor, weight: Tensor, **options: Any
) -> tuple[Tensor, Any]:
    return linear_dapo_loss(
        hidden,
        weight,
        inputs.linear.token_ids.to(device),
        **inputs.tokens_on(device),
        **inputs.rule,
        **inputs.linear.options(device),
        **options,
    )
