"""logprob against numpy in float64, beside plain torch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_backends import not_interpreted
from kernel_draws import LogitsInputs, draw_logits
from logprob_truth import check
from torch import Tensor

from dapo_kernels import logprob

FLOATS = [torch.float32, torch.bfloat16]
CASES = [
    # tokens, columns, real columns, temperature
    pytest.param(1, 5, 5, 1.0, id="one-token"),
    pytest.param(7, 33, 33, 0.7, id="row-is-no-multiple-of-a-load"),
    pytest.param(6, 1187, 1187, 1.3, id="prime-vocabulary"),
    pytest.param(13, 264, 250, 0.6, id="padded-vocabulary"),
    pytest.param(3, 4097, 4097, 1.0, id="one-column-more-than-a-block"),
    pytest.param(2, 4096, 4096, 0.9, id="blocks-without-remainder"),
    pytest.param(5, 4, 1, 0.7, id="only-one-real-column"),
    pytest.param(3, 48, 48, 0.01, id="cold"),
    pytest.param(3, 48, 48, 50.0, id="hot"),
    pytest.param(1500, 129, 127, 0.7, marks=not_interpreted, id="many-rows"),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("num_tokens", "columns", "valid", "temperature"), CASES)
def test_no_worse_than_torch(
    device: str,
    num_tokens: int,
    columns: int,
    valid: int,
    temperature: float,
    dtype: torch.dtype,
) -> None:
    inputs = draw_logits(num_tokens, columns, valid=valid, temperature=temperature, dtype=dtype)
    results = inputs.run(device)
    check(results, inputs.run_plain(device), inputs.truth())
    assert results["logprobs"].dtype == results["entropy"].dtype == torch.float32
    assert results["grad_logits"].dtype == dtype
    assert (results["grad_logits"][:, valid:] == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_needs_the_allowance_for_torch(device: str, dtype: torch.dtype) -> None:
    """In bfloat16 torch loses 2^-9 of a log-prob; ours are as exact as from float32 logits."""
    inputs = draw_logits(8, 300, dtype=dtype)
    results, plain, truth = inputs.run(device), inputs.run_plain(device), inputs.truth()
    check(results, None, truth)
    if dtype == torch.bfloat16:
        with pytest.raises(AssertionError, match="logprobs"):
            check(plain, None, truth)


def test_float64_is_exact(device: str) -> None:
    """1e-12: some thousand roundings of values up to 30."""
    inputs = draw_logits(9, 70, valid=61, dtype=torch.float64)
    results, truth = inputs.run(device), inputs.truth()
    for name, true in truth.items():
        assert results[name].dtype == torch.float64
        np.testing.assert_allclose(results[name].numpy(), true.value, rtol=1e-12, atol=1e-13)


def test_gradcheck_of_both_results(device: str) -> None:
    inputs = draw_logits(5, 9, valid=8, dtype=torch.float64)

    def both(logits: Tensor) -> tuple[Tensor, Tensor]:
        ids = inputs.token_ids.to(device)
        return logprob(logits, ids, temperature=0.7, valid_vocab=8, inplace_backward=False)

    assert torch.autograd.gradcheck(both, (inputs.logits.to(device).requires_grad_(),))


# ------------------------------------------------------------------ negative controls

Wrong = Callable[..., Any]


def _mask_one_column_short(right: Wrong) -> Wrong:
    def write_statistics(out: Tensor, logits: Tensor, ids: Tensor, shard: Any, *rest: Any) -> None:
        right(out, logits, ids, replace(shard, num_valid=shard.num_valid - 1), *rest)

    return write_statistics


def _mask_one_column_long(right: Wrong) -> Wrong:
    def write_statistics(out: Tensor, logits: Tensor, ids: Tensor, shard: Any, *rest: Any) -> None:
        right(out, logits, ids, replace(shard, num_valid=shard.num_valid + 1), *rest)

    return write_statistics


def _entropy_from_the_wrong_sum(right: Wrong) -> Wrong:
    def write_statistics(out: Tensor, *rest: Any) -> None:
        right(out, *rest)
        out[..., 2] *= 1.001

    return write_statistics


def _upstream_read_as_a_scalar(right: Wrong) -> Wrong:
    def write_gradient(*args: Any) -> Any:
        args = list(args)
        args[5] = torch.full_like(args[5], float(args[5][0]))
        return right(*args)

    return write_gradient


def _entropy_gradient_dropped(right: Wrong) -> Wrong:
    def write_gradient(*args: Any) -> Any:
        return right(*args[:6], None, *args[7:])

    return write_gradient


def _gradient_without_temperature(right: Wrong) -> Wrong:
    def write_gradient(logits: Tensor, ids: Tensor, shard: Any, inverse: float, *rest: Any) -> Any:
        return right(logits, ids, shard, inverse, *rest).div_(inverse)

    return write_gradient


WRONG = [
    _mask_one_column_short,
    _mask_one_column_long,
    _entropy_from_the_wrong_sum,
    _upstream_read_as_a_scalar,
    _entropy_gradient_dropped,
    _gradient_without_temperature,
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_the_measure_rejects_wrong_kernels(
    device: str,
    ops: Any,
    wrong: Callable[[Wrong], Wrong],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = draw_logits(8, 40, valid=33, dtype=dtype)
    inputs.token_ids.clamp_(max=31)
    inputs.logits[:, 32:34] = inputs.logits.amax(1, keepdim=True)
    plain, truth = inputs.run_plain(device), inputs.truth()
    check(inputs.run(device), plain, truth)
    name = "write_statistics" if "out" in _names(wrong) else "write_gradient"
    monkeypatch.setattr(ops, name, wrong(getattr(ops, name)))
    with pytest.raises(AssertionError, match="allowed is"):
        check(inputs.run(device), plain, truth)


def _names(wrong: Callable[[Wrong], Wrong]) -> tuple[str, ...]:
    """Of the arguments of the function it makes."""
    return wrong(lambda *_: None).__code__.co_varnames  # type: ignore[attr-defined]


# ------------------------------------------------------------------ bits


def test_repeated_calls_give_the_same_bits(device: str) -> None:
    inputs = draw_logits(8, 300, dtype=torch.bfloat16)
    assert_same_bits(inputs.run(device), inputs.run(device))


def test_scoring_gives_the_bits_of_training(device: str) -> None:
    inputs = draw_logits(8, 300, dtype=torch.bfloat16)
    results = inputs.run(device)
    with torch.no_grad():
        logprobs, entropy = score(inputs, device)
    assert torch.equal(logprobs.cpu(), results["logprobs"])
    assert torch.equal(entropy.cpu(), results["entropy"])
    assert not logprobs.requires_grad


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_in_place_and_beside_are_the_same_bits(device: str, dtype: torch.dtype) -> None:
    inputs = draw_logits(6, 100, valid=90, dtype=dtype)
    assert_same_bits(
        inputs.run(device, inplace_backward=True), inputs.run(device, inplace_backward=False)
    )


def score(inputs: LogitsInputs, device: str, **options: Any) -> tuple[Tensor, Tensor]:
    return logprob(
        inputs.logits.to(device),
        inputs.token_ids.to(device),
        temperature=inputs.temperature,
        valid_vocab=inputs.valid_vocab,
        **options,
    )


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# ------------------------------------------------------------------ where the gradient goes


def test_gradient_overwrites_the_logits_only_if_it_may(device: str) -> None:
    inputs = draw_logits(4, 50)
    leaf = inputs.logits.to(device).requires_grad_()
    for inplace in (False, True):
        logits = leaf.clone()
        logprobs, _ = logprob(logits, inputs.token_ids.to(device), inplace_backward=inplace)
        (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
        assert (gradient.data_ptr() == logits.data_ptr()) == inplace
        assert torch.equal(logits, leaf) != inplace


def test_second_backward(device: str) -> None:
    """In place it is refused, for the logits are gone; beside them it gives the same again."""
    inputs = draw_logits(4, 50)
    leaf = inputs.logits.to(device).requires_grad_()
    logprobs, _ = logprob(leaf.clone(), inputs.token_ids.to(device))
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward, .* Pass inplace_backward=False"):
        logprobs.sum().backward()
    logprobs, _ = logprob(leaf.clone(), inputs.token_ids.to(device), inplace_backward=False)
    first, second = (
        torch.autograd.grad(logprobs.sum(), leaf, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_another_reader_of_the_logits_is_told(device: str) -> None:
    """Autograd must see the overwriting: a gradient of overwritten logits would be silent."""
    inputs = draw_logits(4, 50)
    logits = inputs.logits.to(device).requires_grad_().clone()
    squares = logits.square().sum()
    logprobs, _ = logprob(logits, inputs.token_ids.to(device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squares + logprobs.sum()).backward()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_far_apart(device: str, dtype: torch.dtype) -> None:
    """Columns of a wider matrix; what lies between the rows is neither read nor written."""
    inputs = draw_logits(6, 45, dtype=dtype)
    wide = torch.full((6, 61), torch.nan, dtype=dtype, device=device)
    wide[:, 3:48] = inputs.logits.to(device)
    logits = wide[:, 3:48].detach().requires_grad_()
    outputs = logprob(logits, inputs.token_ids.to(device), temperature=inputs.temperature)
    upstream = (inputs.grad_logprobs.to(device), inputs.grad_entropy.to(device))
    torch.autograd.backward(outputs, upstream)
    gradient = wide[:, 3:48]
    results = {"logprobs": outputs[0], "entropy": outputs[1], "grad_logits": gradient}
    check(results, None, inputs.truth())
    assert wide[:, :3].isnan().all()
    assert wide[:, 48:].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("columns", [60, 9000], ids=["one-part", "row-in-parts"])
def test_rows_not_kept_are_not_there(device: str, columns: int, dtype: torch.dtype) -> None:
    inputs = draw_logits(9, columns, valid=columns - 5, dtype=dtype)
    inputs.keep = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1]).bool()
    truth = inputs.truth()
    inputs.logits[~inputs.keep] = torch.nan
    results = inputs.run(device)
    check(results, None, truth)
    for name, value in results.items():
        assert (value[~inputs.keep] == 0).all(), name


def test_forward_reads_only(device: str) -> None:
    inputs = draw_logits(5, 40, dtype=torch.bfloat16)
    logits = inputs.logits.to(device).requires_grad_()
    logprob(
        logits, inputs.token_ids.to(device), keep=torch.tensor([0, 1, 1, 0, 1]).bool().to(device)
    )
    assert torch.equal(logits.cpu(), inputs.logits)


def test_valid_vocab_of_none_is_all_columns(device: str) -> None:
    inputs = draw_logits(5, 40)
    logits, ids = inputs.logits.to(device), inputs.token_ids.to(device)
    assert torch.equal(logprob(logits, ids)[0], logprob(logits, ids, valid_vocab=40)[0])
    assert not torch.equal(logprob(logits, ids)[0], logprob(logits, ids % 39, valid_vocab=39)[0])


def test_logits_without_gradient(device: str) -> None:
    inputs = draw_logits(3, 20)
    assert not any(output.requires_grad for output in score(inputs, device))
