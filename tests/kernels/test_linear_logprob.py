"""linear_logprob against numpy in float64, beside plain torch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_backends import not_interpreted, tokens_here
from kernel_draws import LinearInputs, Results, draw_linear
from logprob_truth import check
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dapo_kernels import linear_dapo_loss, linear_logprob

FLOATS = [torch.float32, torch.bfloat16]
CASES = [
    # tokens, hidden size, rows of the weight, real rows, chunk_tokens
    pytest.param(1, 8, 5, 5, 2048, id="one-token"),
    pytest.param(7, 16, 33, 33, 3, id="chunk-divides-nothing"),
    pytest.param(8, 32, 64, 64, 4, id="chunk-divides-all"),
    pytest.param(5, 16, 33, 33, 1, id="chunks-of-one-token"),
    pytest.param(6, 24, 1187, 1187, 4, id="prime-vocabulary"),
    pytest.param(9, 8, 4, 1, 4, id="only-one-real-row"),
    pytest.param(13, 128, 264, 250, 2048, id="padded-vocabulary-one-chunk"),
    pytest.param(3, 8, 4097, 4097, 2, id="one-row-more-than-a-block"),
    pytest.param(400, 48, 1187, 1100, 150, marks=not_interpreted, id="chunks-of-a-tile"),
]


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
    inputs = draw_linear(num_tokens, size, num_rows, valid=valid, dtype=dtype)
    results = inputs.run(device, chunk_tokens=chunk)
    check(results, inputs.run_plain(device), inputs.truth())
    assert results["logprobs"].dtype == results["entropy"].dtype == torch.float32
    assert results["grad_hidden"].dtype == results["grad_weight"].dtype == dtype
    assert (results["grad_weight"][valid:] == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_needs_the_allowance_for_torch(device: str, dtype: torch.dtype) -> None:
    """Logits are float32 inside: log-probs are as exact as from float32 inputs."""
    inputs = draw_linear(12, 64, 264, valid=250, dtype=dtype)
    check(inputs.run(device, chunk_tokens=8), None, inputs.truth())
    if dtype == torch.bfloat16:
        with pytest.raises(AssertionError, match="logprobs"):
            check(inputs.run_plain(device), None, inputs.truth())


def test_bfloat16_logits_cost_one_rounding_of_them(device: str) -> None:
    """Half the memory, and log-probs that float32 logits would not have."""
    inputs = draw_linear(12, 64, 264, valid=250, dtype=torch.bfloat16)
    results = inputs.run(device, chunk_tokens=8, logits_dtype=torch.bfloat16)
    check(results, None, inputs.truth(torch.bfloat16))
    with pytest.raises(AssertionError, match="logprobs"):
        check(results, inputs.run_plain(device), inputs.truth())


def test_float64_is_exact(device: str) -> None:
    """1e-12: some thousand roundings of values up to 30."""
    inputs = draw_linear(9, 12, 70, valid=61, dtype=torch.float64)
    results, truth = inputs.run(device, chunk_tokens=4), inputs.truth()
    for name, true in truth.items():
        assert results[name].dtype == torch.float64
        np.testing.assert_allclose(results[name].numpy(), true.value, rtol=1e-12, atol=1e-12)


def test_gradcheck_of_both_results(device: str) -> None:
    inputs = draw_linear(6, 5, 8, valid=7, dtype=torch.float64)

    def both(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ids = inputs.token_ids.to(device)
        return linear_logprob(hidden, weight, ids, temperature=0.7, valid_vocab=7, chunk_tokens=4)

    assert torch.autograd.gradcheck(both, inputs.leaves(device))


# ------------------------------------------------------------------ negative controls


def _one_column_too_many(inputs: LinearInputs, device: str) -> Results:
    return replace(inputs, valid_vocab=inputs.valid_vocab + 1).run(device)


def _one_column_too_few(inputs: LinearInputs, device: str) -> Results:
    return replace(inputs, valid_vocab=inputs.valid_vocab - 1).run(device)


def _gradient_without_temperature(inputs: LinearInputs, device: str) -> Results:
    results = inputs.run(device)
    return {**results, "grad_hidden": results["grad_hidden"] * inputs.temperature}


def _upstream_averaged(inputs: LinearInputs, device: str) -> Results:
    mean = torch.full_like(inputs.grad_logprobs, float(inputs.grad_logprobs.mean()))
    return replace(inputs, grad_logprobs=mean).run(device)


def _entropy_gradient_dropped(inputs: LinearInputs, device: str) -> Results:
    nothing = torch.zeros_like(inputs.grad_entropy)
    return replace(inputs, grad_entropy=nothing).run(device)


def _last_chunk_forgotten(inputs: LinearInputs, device: str) -> Results:
    results = inputs.run(device)
    kept = torch.arange(len(inputs.hidden)) < 4
    part = replace(inputs, grad_logprobs=inputs.grad_logprobs * kept)
    return {**results, "grad_weight": part.run(device)["grad_weight"]}


def _logits_in_bfloat16(inputs: LinearInputs, device: str) -> Results:
    hidden, weight = inputs.hidden.bfloat16(), inputs.weight.bfloat16()
    results = replace(inputs, hidden=hidden, weight=weight).run(device)
    return {name: value.to(inputs.hidden.dtype) for name, value in results.items()}


WRONG = [
    _one_column_too_many,
    _one_column_too_few,
    _gradient_without_temperature,
    _upstream_averaged,
    _entropy_gradient_dropped,
    _last_chunk_forgotten,
    _logits_in_bfloat16,
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_the_measure_rejects_wrong_results(
    device: str, wrong: Callable[[LinearInputs, str], Results], dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and wrong is _logits_in_bfloat16:
        pytest.skip("in bfloat16 that is test_bfloat16_logits_cost_one_rounding_of_them")
    inputs = draw_linear(6, 16, 40, valid=33, dtype=dtype)
    inputs.token_ids.clamp_(max=31)
    plain, truth = inputs.run_plain(device), inputs.truth()
    check(inputs.run(device), plain, truth)
    with pytest.raises(AssertionError, match="allowed is"):
        check(wrong(inputs, device), plain, truth)


# ------------------------------------------------------------------ bits


@pytest.mark.parametrize("logits_dtype", [None, torch.bfloat16], ids=str)
def test_scoring_gives_the_bits_of_training(device: str, logits_dtype: torch.dtype | None) -> None:
    """Else the ratio before the first update would not be exactly 1."""
    inputs = draw_linear(tokens_here(50), 32, 70, dtype=torch.bfloat16)
    results = inputs.run(device, chunk_tokens=3, logits_dtype=logits_dtype)
    with torch.no_grad():
        logprobs, entropy = linear_logprob(
            *inputs.leaves(device),
            inputs.token_ids.to(device),
            **inputs.options(device),
            chunk_tokens=3,
            logits_dtype=logits_dtype,
        )
    assert torch.equal(logprobs.cpu(), results["logprobs"])
    assert torch.equal(entropy.cpu(), results["entropy"])
    assert not logprobs.requires_grad


def test_repeated_calls_give_the_same_bits(device: str) -> None:
    inputs = draw_linear(tokens_here(50), 32, 70, dtype=torch.bfloat16)
    first, second = (inputs.run(device, chunk_tokens=5) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_without_a_group_it_is_all_the_same_who_sums(device: str) -> None:
    inputs = draw_linear(7, 16, 33)
    expected = inputs.run(device, hidden_grad="all_reduce")
    for contract in ("partial", "reduce_scatter"):
        results = inputs.run(device, hidden_grad=contract)
        assert all(torch.equal(results[name], expected[name]) for name in expected)


# ------------------------------------------------------------------ which tokens, which gradients


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([0, 2, 3, 8], id="some"),
        pytest.param([8, 1, 5], id="in-any-order"),
        pytest.param([4], id="one"),
        pytest.param([], id="none"),
    ],
)
def test_rows_that_take_part(device: str, rows: list[int], dtype: torch.dtype) -> None:
    inputs = draw_linear(9, 16, 33, valid=30, dtype=dtype)
    inputs.rows = torch.tensor(rows, dtype=torch.int64)
    left_out = ~torch.isin(torch.arange(9), inputs.rows)
    truth = inputs.truth()
    inputs.hidden[left_out] = torch.nan
    results = inputs.run(device, chunk_tokens=2)
    check(results, None, truth)
    for name in ("logprobs", "entropy", "grad_hidden"):
        assert (results[name][left_out] == 0).all()


def test_frozen_inputs_get_no_gradient(device: str) -> None:
    inputs = draw_linear(5, 4, 6)
    everything = inputs.run(device)
    for frozen, name in enumerate(("grad_weight", "grad_hidden")):
        leaves = inputs.leaves(device)
        leaves[frozen].requires_grad_(False)
        outputs = linear_logprob(*leaves, inputs.token_ids.to(device), **inputs.options(device))
        torch.autograd.backward(
            outputs, (inputs.grad_logprobs.to(device), inputs.grad_entropy.to(device))
        )
        assert leaves[frozen].grad is None
        gradient = leaves[1 - frozen].grad
        assert gradient is not None
        assert torch.equal(gradient.cpu(), everything[name])


def test_either_result_may_be_unused(device: str) -> None:
    inputs = draw_linear(6, 8, 20)
    for number, silent in enumerate(("grad_entropy", "grad_logprobs")):
        hidden, weight = inputs.leaves(device)
        outputs = linear_logprob(
            hidden, weight, inputs.token_ids.to(device), **inputs.options(device)
        )
        upstream = (inputs.grad_logprobs, inputs.grad_entropy)[number]
        outputs[number].backward(upstream.to(device))
        alone = replace(inputs, **{silent: torch.zeros(6)})
        results = {
            **alone.run(device),
            "grad_hidden": hidden.grad,
            "grad_weight": weight.grad,
        }
        check(results, None, alone.truth())


def test_second_backward_recomputes(device: str) -> None:
    inputs = draw_linear(6, 8, 20)
    hidden, weight = inputs.leaves(device)
    logprobs, _ = linear_logprob(hidden, weight, inputs.token_ids.to(device))
    first, second = (
        torch.autograd.grad(logprobs.sum(), (hidden, weight), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


# ------------------------------------------------------------------ memory


class _LargestTensor(TorchFunctionMode):
    numel = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_all_logits_never_exist(device: str) -> None:
    """At most those of one chunk, rows rounded up to 16 bytes or so."""
    inputs = draw_linear(24, 8, 500)
    tokens = [torch.zeros(24, device=device), None, torch.ones(24, device=device)]
    with _LargestTensor() as seen:
        inputs.run(device, chunk_tokens=8)
    assert 8 * 500 <= seen.numel <= 8 * 512
    with _LargestTensor() as seen:
        loss, _ = linear_dapo_loss(
            *inputs.leaves(device),
            inputs.token_ids.to(device),
            *tokens,
            torch.ones(24, device=device),
            clip_low=0.2,
            clip_high=0.28,
            chunk_tokens=8,
        )
        loss.backward()
    assert 8 * 500 <= seen.numel <= 8 * 512
    with _LargestTensor() as seen:
        inputs.run_plain(device)
    assert seen.numel == 24 * 500
