"""Traps of rows and tokens that are partly or wholly not there: -inf, padding, masks, ids."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_backends import cpu_checks_only
from kernel_draws import RULE, draw_dapo, draw_linear, draw_logits, draw_tokens
from logprob_truth import check

from dapo_kernels import dapo_loss, linear_logprob, logprob
from dapo_kernels.vocab import VocabShard

FLOATS = [torch.float32, torch.bfloat16]


# ------------------------------------------------------------------ 14: logits of -inf


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_trap_14_banned_columns(device: str, dtype: torch.dtype) -> None:
    """Probability 0, gradient 0, and nothing of (-inf) - (-inf) or 0 * (-inf) in the others.

    First block of a row all banned, last all banned, every second, all but the token.
    """
    inputs = draw_logits(4, 9000, valid=8990, dtype=dtype)
    inputs.token_ids = torch.tensor([8500, 17, 2468, 4097])
    inputs.logits[0, :8192] = -torch.inf
    inputs.logits[1, 64:] = -torch.inf
    inputs.logits[2, 1::2] = -torch.inf
    inputs.logits[3] = -torch.inf
    inputs.logits[3, 4097] = 3.0
    results = inputs.run(device)
    check(results, None, inputs.truth())
    assert (results["grad_logits"][inputs.logits.isneginf()] == 0).all()
    assert results["logprobs"][3] == 0.0
    assert results["entropy"][3] == 0.0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_trap_14_banned_token(device: str, dtype: torch.dtype) -> None:
    """Log-prob -inf and no gradient by it; the entropy of its row is as good as any."""
    inputs = draw_logits(5, 40, valid=33, dtype=dtype)
    inputs.logits[torch.arange(5), inputs.token_ids] = -torch.inf
    results = inputs.run(device)
    assert results["logprobs"].isneginf().all()
    check(results, None, inputs.truth())
    alone = replace(inputs, grad_entropy=torch.zeros(5)).run(device)
    assert (alone["grad_logits"] == 0).all()


def test_trap_14_impossible_tokens_are_counted(device: str) -> None:
    """They add nothing to loss, gradient or means; a token without weight is not counted."""
    tokens = draw_tokens(torch.linspace(-3, -1, 12).double().numpy())
    logprobs = torch.linspace(-3, -1, 12)
    tokens["token_weights"] = torch.tensor([1.0, 2.0, 0.0] * 4)
    logprobs[[1, 2, 6]] = -torch.inf
    here = {name: value.to(device) for name, value in tokens.items()}
    leaf = logprobs.to(device).requires_grad_()
    loss, stats = dapo_loss(leaf, **here, **RULE)
    loss.backward()
    rest = torch.tensor([0, 3, 4, 5, 7, 8, 9, 10, 11])
    others = {name: value[rest].to(device) for name, value in tokens.items()}
    expected, expected_stats = dapo_loss(logprobs[rest].to(device), **others, **RULE)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert leaf.grad is not None
    assert (leaf.grad[[1, 2, 6]] == 0).all()
    assert float(stats.impossible) == 2.0
    assert float(stats.tokens) == 8.0
    for name in ("ratio_sum", "importance_sum", "kl_sum", "logratio_sum"):
        assert float(getattr(stats, name)) == pytest.approx(
            float(getattr(expected_stats, name)), rel=1e-6
        )


def test_trap_14_banned_rows_of_the_weight(device: str) -> None:
    """Values only: the gradient of hidden goes through weights of -inf by any account."""
    inputs = draw_linear(6, 4, 9)
    inputs.hidden.abs_()
    inputs.token_ids = torch.tensor([0, 1, 2, 3, 4, 8])
    allowed = replace(inputs, weight=inputs.weight[:8], token_ids=inputs.token_ids.clamp(max=7))
    truth = replace(allowed, valid_vocab=8).truth()
    inputs.weight[8] = -torch.inf
    with torch.no_grad():
        logprobs, entropy = linear_logprob(
            *inputs.leaves(device), inputs.token_ids.to(device), temperature=0.7
        )
    assert logprobs[5].isneginf()
    truth["logprobs"].value[5] = -math.inf
    results = {"logprobs": logprobs, "entropy": entropy}
    check(results, None, {name: truth[name] for name in results})


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_trap_14_nan_is_not_hidden(device: str, poison: float) -> None:
    """Maxima drop NaN, and a mask by comparison would turn it into a banned logit."""
    inputs = draw_logits(3, 5000)
    inputs.logits[1, 4567] = poison
    results = inputs.run(device)
    assert results["logprobs"].isnan().tolist() == [False, True, False]
    assert results["entropy"].isnan().tolist() == [False, True, False]
    assert results["grad_logits"].isnan().any(1).tolist() == [False, True, False]


# ------------------------------------------------------------------ 15: nothing left of a row


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_trap_15_row_of_nothing_but_minus_infinity(device: str, dtype: torch.dtype) -> None:
    inputs = draw_logits(3, 5000, valid=4990, dtype=dtype)
    inputs.logits[1] = -torch.inf
    results = inputs.run(device)
    assert results["logprobs"][1].isneginf()
    assert results["entropy"][1] == 0.0
    assert (results["grad_logits"][1] == 0).all()
    check(results, None, inputs.truth())


def test_trap_15_no_row_kept(device: str) -> None:
    inputs = draw_logits(4, 30)
    inputs.logits.fill_(torch.nan)
    inputs.keep = torch.zeros(4, dtype=torch.bool)
    for name, value in inputs.run(device).items():
        assert (value == 0).all(), name


def test_trap_15_all_tokens_of_weight_zero(device: str) -> None:
    """Loss and gradients exactly 0, not 0 / 0, whatever the other inputs hold."""
    inputs = draw_dapo(draw_linear(6, 8, 20))
    inputs.tokens["token_weights"] = torch.zeros(6)
    inputs.tokens["old_logprobs"] = torch.full((6,), torch.nan)
    results, stats = inputs.run(device)
    for name, value in results.items():
        assert (value == 0).all(), name
    for name in (
        "tokens",
        "ratio_sum",
        "importance_sum",
        "kl_sum",
        "ratio_max_diff",
        "entropy_sum",
    ):
        assert float(getattr(stats, name)) == 0.0, name


def test_trap_15_rows_without_upstream(device: str) -> None:
    """Logits that overflow at a token without gradient: 0 * NaN must not reach the weight."""
    inputs = draw_linear(6, 8, 5)
    inputs.grad_logprobs[2] = inputs.grad_entropy[2] = 0.0
    clean = inputs.run(device)
    inputs.hidden[2] = 3e38
    results = inputs.run(device)
    assert not torch.isfinite(results["logprobs"][2])
    assert (results["grad_hidden"][2] == 0).all()
    assert torch.equal(results["grad_weight"], clean["grad_weight"])


def test_trap_15_all_rows_without_upstream(device: str) -> None:
    for inputs in (draw_logits(6, 5), draw_linear(6, 8, 5)):
        inputs.grad_logprobs.zero_()
        inputs.grad_entropy.zero_()
        for name, value in inputs.run(device).items():
            assert (value == 0).all() == name.startswith("grad_"), name


@pytest.mark.parametrize("size", [0, 1])
def test_trap_15_no_token_at_all(device: str, size: int) -> None:
    """Of none, and of one for comparison."""
    logits = draw_logits(size, 30).run(device)
    assert logits["logprobs"].shape == logits["entropy"].shape == (size,)
    assert logits["grad_logits"].shape == (size, 30)
    inputs = draw_dapo(draw_linear(size, 8, 30))
    hidden = inputs.linear.run(device)
    fused, stats = inputs.run(device)
    for results in (hidden, fused):
        assert results["grad_hidden"].shape == (size, 8)
        assert (results["grad_weight"] == 0).all() == (size == 0)
    assert float(stats.tokens) == size
    assert (float(fused["loss"]) == 0) == (size == 0)


# ------------------------------------------------------------------ 16: ids used as an index


@pytest.mark.parametrize("outside", [-100, -1, 39, 73, 79, 80, 2**31, 2**40, -(2**40)], ids=str)
def test_trap_16_id_outside_reads_and_writes_nothing(device: str, ops: Any, outside: int) -> None:
    """Log-prob -inf, gradient 0; the neighbours in memory and the other rows stay as they are.

    Of a shard of the columns 40 to 79, of which those from 73 on are padding. The row operations
    themselves: on a CPU the functions refuse such an id before.
    """
    inputs = draw_logits(5, 40, valid=33, temperature=1.0)
    shard = VocabShard(start=40, num_columns=40, num_valid=33, group=None)
    ids = inputs.token_ids + 40
    ids[2] = outside
    memory = torch.full((9, 40), 7.0, device=device)
    memory[2:7] = inputs.logits.to(device)
    logits = memory[2:7]
    statistics = torch.empty(1, 5, 4, device=device)
    ops.write_statistics(statistics, logits, ids.to(device), shard, 1.0)
    results = ops.combine(statistics, 1.0)
    assert results.logprobs.isneginf().tolist() == [False, False, True, False, False]
    upstream = torch.ones(5, device=device)
    ops.write_gradient(
        logits, ids.to(device), shard, 1.0, results, upstream, None, torch.float32, None
    )
    assert (memory[:2] == 7.0).all()
    assert (memory[7:] == 7.0).all()
    assert (memory[4] == 0).all()
    inputs.grad_logprobs, inputs.grad_entropy = torch.ones(5), torch.zeros(5)
    expected = inputs.run(device)["grad_logits"]
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(logits.cpu()[kept], expected[kept], rtol=2.0**-20, atol=0.0)


@cpu_checks_only
@pytest.mark.parametrize("function", [logprob, linear_logprob])
def test_trap_16_ignore_index_is_refused(function: Any) -> None:
    """Tokens that do not train have any id inside and no weight; -100 is somebody's mistake."""
    ids = torch.tensor([0, -100, 2])
    matrices = (
        [torch.zeros(3, 5)] if function is logprob else [torch.zeros(3, 4), torch.zeros(5, 4)]
    )
    with pytest.raises(ValueError, match=r"token_ids\[1\] is -100, .* do not train"):
        function(*matrices, ids)


# ------------------------------------------------------------------ 18: padding of the vocabulary


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("padding", [0.0, 1e4, -1e4, math.inf, math.nan])
def test_trap_18_padding_columns_take_no_part(
    device: str, padding: float, dtype: torch.dtype
) -> None:
    """Whatever they hold: a last block of padding only, and one that is shared with tokens."""
    inputs = draw_logits(2, 9000, valid=4500, dtype=dtype)
    inputs.logits[:, 4500:] = padding
    results = inputs.run(device)
    check(results, None, inputs.truth())
    assert (results["grad_logits"][:, 4500:] == 0).all()
    if padding == 1e4:
        with pytest.raises(AssertionError, match="logprobs"):
            check(replace(inputs, valid_vocab=9000).run(device), None, inputs.truth())


def test_trap_18_padding_rows_of_the_weight_take_no_part(device: str) -> None:
    inputs = draw_dapo(draw_linear(7, 16, 40, valid=33))
    before, _ = inputs.run(device)
    inputs.linear.weight[33:] = 1e4
    after, _ = inputs.run(device)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0.0, atol=0.0)
    inputs.linear.valid_vocab = 40
    assert not torch.equal(inputs.run(device)[0]["loss"], before["loss"])


def test_trap_18_padding_of_main_grad_is_not_touched(device: str) -> None:
    inputs = draw_dapo(draw_linear(7, 16, 40, valid=33))
    main_grad = torch.full((40, 16), 0.5, device=device)
    inputs.run(device, main_grad=main_grad)
    assert (main_grad[33:] == 0.5).all()
    assert (main_grad[:33] != 0.5).any(1).all()
