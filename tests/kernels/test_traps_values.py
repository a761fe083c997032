"""Where kernels like these have given wrong numbers elsewhere: one test for each trap.

The numbers are those of the list of traps the kernels were designed against. Those of memory,
launches and imports are in test_traps_memory, of compiled code in test_compiled, of collectives
(19) in tests/multiproc/test_vocab_parallel_linear.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_backends import IS_INTERPRETED, torch_alone
from kernel_draws import (
    LogitsInputs,
    draw_dapo,
    draw_linear,
    draw_logits,
    stats_of,
)
from logprob_truth import (
    APPROXIMATION,
    BF16_ROUNDING,
    UNIT,
    array,
    check,
    logits_gradient,
    softmax_truth,
)
from torch import Tensor

from dapo_kernels import gradients, linear_logprob
from dapo_kernels.vocab import VocabShard

FLOATS = [torch.float32, torch.bfloat16]
BLOCK = 4096
WIDTHS = [
    pytest.param(75968, id="151936-over-2"),
    pytest.param(37984, id="151936-over-4"),
    pytest.param(18992, id="151936-over-8"),
    pytest.param(129920, id="padded-to-128"),
    pytest.param(50257, id="odd"),
]


def here(width: int) -> int:
    """For the interpreter a small one that leaves the same columns in the last block."""
    return BLOCK + width % BLOCK if IS_INTERPRETED else width


# ------------------------------------------------------------------ 1: columns that are not there


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_trap_01_columns_out_of_range(
    device: str, ops: Any, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far below 0, so that a single exp(0) would outweigh the whole row."""
    valid = here(width)
    inputs = draw_logits(2, valid + 3, valid=valid, dtype=dtype)
    inputs.logits -= 1000.0
    inputs.logits[:, valid:] = 0.0
    truth = inputs.truth()
    check(inputs.run(device), None, truth)

    right = ops.write_statistics

    def leaky(out: Tensor, logits: Tensor, ids: Tensor, shard: VocabShard, *rest: Any) -> None:
        right(out, logits, ids, replace(shard, num_valid=shard.num_valid + 1), *rest)

    monkeypatch.setattr(ops, "write_statistics", leaky)
    with pytest.raises(AssertionError, match="logprobs"):
        check(inputs.run(device), None, truth)


@pytest.mark.parametrize("width", WIDTHS)
def test_trap_01_ragged_shards_combine_like_one(device: str, ops: Any, width: int) -> None:
    """The pure part of vocab parallelism, ranks looped over; the last holds nothing but padding.

    Each row is split into as many parts as the backend likes; a row alone into the most.
    """
    columns = here(width) + (BLOCK if IS_INTERPRETED else 0)
    splits = ops.num_splits(1, columns)
    inputs = draw_logits(3, 3 * columns, valid=2 * columns - 5, temperature=0.7)
    logits, ids = inputs.logits.to(device), inputs.token_ids.to(device)
    splits = min(splits, ops.num_splits(1, columns))
    parts = []
    for rank in range(3):
        start = rank * columns
        valid = min(max(inputs.valid_vocab - start, 0), columns)
        shard = VocabShard(start=start, num_columns=columns, num_valid=valid, group=None)
        part = torch.full((splits, 3, 4), torch.nan, device=device)
        ops.write_statistics(part, logits[:, start : start + columns], ids, shard, 1 / 0.7)
        parts.append(part)
    together = ops.combine(torch.cat(parts), 1 / 0.7)
    truth = inputs.truth()
    results = {"logprobs": together.logprobs, "entropy": together.entropy}
    check(results, None, {name: truth[name] for name in results})
    wrong = ops.combine(torch.cat(parts[1:]), 1 / 0.7)
    with pytest.raises(AssertionError, match="logprobs"):
        check({"logprobs": wrong.logprobs}, None, {"logprobs": truth["logprobs"]})


# ------------------------------------------------------------------ 2: a maximum that starts at 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_trap_02_shift_of_all_logits_changes_nothing(
    device: str, ops: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits that stay exact when shifted; what is allowed is that of the unshifted ones."""
    step = 1 / 16 if dtype == torch.float32 else 8
    inputs = draw_logits(4, 300, valid=290)
    inputs.logits = (inputs.logits / step).round() * step
    truth = replace(inputs, logits=inputs.logits.to(dtype)).truth()
    low, high = (
        replace(inputs, logits=(inputs.logits + shift).to(dtype)) for shift in (-1024.0, 1024.0)
    )
    for shifted in (low, high):
        check(shifted.run(device), None, truth)

    right = ops.write_statistics

    def starts_at_zero(out: Tensor, *rest: Any) -> None:
        right(out, *rest)
        # Beside exp(0 - 0) of a maximum that is not there, exp of -1000 is nothing.
        out[..., :3] = torch.where(out[..., :1] < 0, 0.0, out[..., :3])

    monkeypatch.setattr(ops, "write_statistics", starts_at_zero)
    check(high.run(device), None, truth)
    with pytest.raises(AssertionError, match="logprobs"):
        check(low.run(device), None, truth)


def test_trap_02_shift_by_the_output_layer(device: str) -> None:
    """The same through hidden states: a column of the weight that adds -1000 to every logit."""
    inputs = draw_linear(6, 16, 50, temperature=1.0)
    inputs.hidden = (inputs.hidden * 4).round() / 4
    inputs.weight = (inputs.weight * 4).round() / 4
    inputs.hidden[:, 0], inputs.weight[:, 0] = 1.0, 0.0
    truth = inputs.truth()
    # Its first column is the shift times a sum that is 0 but for rounding.
    del truth["grad_hidden"]
    for shift in (-1000.0, 1000.0):
        inputs.weight[:, 0] = shift
        results = inputs.run(device)
        check({name: results[name] for name in truth}, None, truth)


# ------------------------------------------------------------------ 3: sums over chunks


@torch_alone
def test_trap_03_gradients_are_summed_in_float32_over_chunks(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bfloat16 sum over chunks lost convergence: the more chunks, the further away."""
    inputs = draw_linear(256, 16, 33, dtype=torch.bfloat16)
    truth = inputs.truth()
    check(inputs.run(device, chunk_tokens=1), None, truth)
    right = gradients.add_product

    def rounded_after_each_chunk(total: Tensor, left: Tensor, factor: Tensor) -> None:
        right(total, left, factor)
        total.copy_(total.bfloat16())

    monkeypatch.setattr(gradients, "add_product", rounded_after_each_chunk)
    with pytest.raises(AssertionError, match="grad_weight"):
        check(inputs.run(device, chunk_tokens=1), None, truth)


# ------------------------------------------------------------------ 4: p - 1 of a confident token


def confident(probability: float, dtype: torch.dtype) -> LogitsInputs:
    """Two columns, the first of which has that probability, up to the rounding of its logit."""
    logits = torch.tensor([[np.log(probability / (1 - probability)), 0.0]], dtype=dtype)
    one, nothing = torch.ones(1), torch.zeros(1)
    return LogitsInputs(logits, torch.tensor([0]), one, nothing, temperature=1.0, valid_vocab=2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999, 0.9999])
def test_trap_04_gradient_of_a_confident_token(
    device: str, ops: Any, probability: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a p that is rounded to bfloat16 nothing would be left of 1 - p."""
    inputs = confident(probability, dtype)
    true = 1 / (1 + np.exp(float(inputs.logits[0, 0])))
    rounding = BF16_ROUNDING if dtype == torch.bfloat16 else 0.0
    # The sum is near 1, and rounded there; so is its logarithm.
    exactly = pytest.approx(true, rel=rounding, abs=2 * APPROXIMATION + 8 * UNIT)
    gradient = inputs.run(device)["grad_logits"]
    assert float(gradient[0, 0]) == exactly
    assert -float(gradient[0, 1]) == exactly

    right = ops.write_gradient

    def from_rounded_p(logits: Tensor, *rest: Any) -> Tensor:
        gradient: Tensor = right(logits, *rest)
        gradient[0, 0] = 1 - rest[3].logprobs[0].exp().bfloat16()
        return gradient

    monkeypatch.setattr(ops, "write_gradient", from_rounded_p)
    assert float(inputs.run(device)["grad_logits"][0, 0]) != exactly


# ------------------------------------------------------------------ 5: upstream read as a scalar


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_trap_05_each_row_has_its_own_upstream(
    device: str, ops: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signed and uneven ones: a kernel that reads the first for all passes with ones."""
    uneven = draw_logits(6, 40, dtype=dtype)
    even = replace(uneven, grad_logprobs=torch.ones(6), grad_entropy=torch.ones(6))
    for inputs in (uneven, even):
        check(inputs.run(device), None, inputs.truth())
    right = ops.write_gradient

    def first_for_all(*args: Any) -> Tensor:
        upstream = [args[5][:1].expand(6), args[6][:1].expand(6)]
        gradient: Tensor = right(*args[:5], *upstream, *args[7:])
        return gradient

    monkeypatch.setattr(ops, "write_gradient", first_for_all)
    check(even.run(device), None, even.truth())
    with pytest.raises(AssertionError, match="grad_logits"):
        check(uneven.run(device), None, uneven.truth())


# ------------------------------------------------------------------ 6: a test of itself


@torch_alone
def test_trap_06_the_truth_is_not_made_by_the_code_under_test() -> None:
    for name in ("logprob_truth.py", "loss_truth.py", "plain_torch.py"):
        tree = ast.parse((Path(__file__).parent / name).read_text())
        modules = {
            module
            for node in ast.walk(tree)
            for module in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert modules
        assert not any(module.startswith("dapo_kernels") for module in modules), name


@torch_alone
@pytest.mark.parametrize("of_entropy", [False, True], ids=["logprob", "entropy"])
def test_trap_06_the_truth_is_its_own_derivative(of_entropy: bool) -> None:
    """Differences of the true values give the true gradient."""
    logits, ids = np.random.default_rng(0).normal(0, 3, (4, 9)), np.array([0, 3, 7, 2])
    weights = np.array([1.0, -2.0, 0.5, 3.0])
    upstream = (0 * weights, weights) if of_entropy else (weights, 0 * weights)

    def value(at: np.ndarray) -> float:
        softmax = softmax_truth(at, ids, temperature=0.6, valid_vocab=8)
        return float(weights @ (softmax.entropy if of_entropy else softmax.logprobs))

    softmax = softmax_truth(logits, ids, temperature=0.6, valid_vocab=8)
    gradient = logits_gradient(softmax, *upstream, temperature=0.6).value
    for place in np.ndindex(4, 9):
        step = np.zeros_like(logits)
        step[place] = 1e-6
        slope = (value(logits + step) - value(logits - step)) / 2e-6
        assert gradient[place] == pytest.approx(slope, rel=1e-6, abs=1e-8)


# ------------------------------------------------------------------ 7: the entropy's gradient


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_trap_07_gradient_of_the_entropy_alone(
    device: str, ops: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_logits = draw_logits(5, 40, valid=33, dtype=dtype)
    from_hidden = draw_linear(5, 16, 40, valid=33, dtype=dtype)
    both: list[Any] = [from_logits, from_hidden]
    for inputs in both:
        inputs.grad_logprobs.zero_()
        check(inputs.run(device), None, inputs.truth())
    right = ops.write_gradient
    monkeypatch.setattr(ops, "write_gradient", lambda *args: right(*args[:6], None, *args[7:]))
    for inputs in both:
        with pytest.raises(AssertionError, match="grad"):
            check(inputs.run(device), None, inputs.truth())


# ------------------------------------------------------------------ 21: temperature


@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_trap_21_temperature_acts_on_float32(
    device: str, ops: Any, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On bfloat16 logits after they are widened, and once more on the gradient."""
    inputs = draw_logits(5, 60, dtype=torch.bfloat16, temperature=temperature)
    truth = inputs.truth()
    check(inputs.run(device), None, truth)
    statistics, gradient = ops.write_statistics, ops.write_gradient

    def rounded(out: Tensor, logits: Tensor, ids: Tensor, shard: Any, scale: float) -> None:
        scaled = (logits * scale).bfloat16().float()
        statistics(out, scaled / scale, ids, shard, scale)

    monkeypatch.setattr(ops, "write_statistics", lambda *args: rounded(*args[:5]))
    with pytest.raises(AssertionError, match="logprobs"):
        check(inputs.run(device), None, truth)
    monkeypatch.setattr(ops, "write_statistics", statistics)
    monkeypatch.setattr(ops, "write_gradient", lambda *args: gradient(*args).mul_(temperature))
    with pytest.raises(AssertionError, match="grad_logits"):
        check(inputs.run(device), None, truth)


# ------------------------------------------------------------------ 22: one scorer


def test_trap_22_on_policy_ratio_is_exactly_one(device: str) -> None:
    """Old log-probs from linear_logprob, loss of the same chunks: not a bit apart."""
    inputs = draw_dapo(draw_linear(11, 16, 40, valid=33, dtype=torch.bfloat16))
    hidden, weight = inputs.linear.leaves(device)
    ids, options = inputs.linear.token_ids.to(device), inputs.linear.options(device)
    with torch.no_grad():
        old, _ = linear_logprob(hidden, weight, ids, **options, chunk_tokens=4)
    inputs.tokens["old_logprobs"] = old.cpu()
    scored, stats = inputs.run(device, chunk_tokens=4)
    assert float(stats.ratio_max_diff) == 0.0
    assert float(stats.logratio_squared_sum) == 0.0
    given_none, _ = inputs.without("old_logprobs").run(device, chunk_tokens=4)
    assert all(torch.equal(value, given_none[name]) for name, value in scored.items())

    inputs.tokens["old_logprobs"] = torch.nextafter(old.cpu(), torch.tensor(-1e9))
    assert float(inputs.run(device, chunk_tokens=4)[1].ratio_max_diff) > 0.0


# ------------------------------------------------------------------ 23: exactness of the head


@pytest.mark.parametrize("temperature", [0.02, 1.0])
def test_trap_23_logprob_is_never_positive(device: str, temperature: float) -> None:
    """Nor the entropy negative, however certain the row."""
    inputs = draw_linear(40 if IS_INTERPRETED else 500, 16, 3, temperature=temperature)
    results = inputs.run(device)
    assert (results["logprobs"] <= 0).all()
    assert (results["entropy"] >= 0).all()


def test_trap_23_logits_of_a_chunk_are_float32(device: str) -> None:
    """Rounded to bfloat16 a logit in [16, 32) is off by up to 1/16 nat, a ratio by 6 %."""
    inputs = draw_linear(8, 32, 64, dtype=torch.bfloat16, temperature=1.0)
    inputs.weight *= 2.5
    truth = inputs.truth()["logprobs"]
    exact, rounded = (
        np.abs(array(inputs.run(device, logits_dtype=dtype)["logprobs"]) - truth.value)
        for dtype in (None, torch.bfloat16)
    )
    assert (exact <= truth.allowed).all()
    assert exact.max() < 1e-4
    assert rounded.max() > 1e-2


# ------------------------------------------------------------------ 24: two accounts of one loss


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("names", [(), ("old_logprobs",)], ids=["old", "on-policy"])
def test_trap_24_fused_loss_is_the_loss(
    device: str, names: tuple[str, ...], dtype: torch.dtype
) -> None:
    """linear_dapo_loss is linear_logprob and dapo_loss: bit by bit, but for sums over chunks."""
    inputs = draw_dapo(draw_linear(11, 16, 40, valid=33, dtype=dtype)).without(*names)
    inputs.linear.rows = torch.tensor([0, 1, 2, 4, 5, 7, 9, 10])
    results, stats = inputs.run(device, chunk_tokens=4)
    expected, expected_stats = inputs.run_composed(device, chunk_tokens=4)
    assert torch.equal(results["grad_hidden"], expected["grad_hidden"])
    assert torch.equal(results["grad_weight"], expected["grad_weight"])
    torch.testing.assert_close(results["loss"], expected["loss"], rtol=2.0**-21, atol=2.0**-21)
    for name in stats_of(stats, inputs.truth()[1]):
        got, other = getattr(stats, name), getattr(expected_stats, name)
        torch.testing.assert_close(got, other, rtol=2.0**-21, atol=2.0**-21)
