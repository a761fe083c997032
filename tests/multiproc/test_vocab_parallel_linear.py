"""Trap 19, who sums the gradient of hidden; and linear_dapo_loss over shards against the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vocab_parallel_world import NUM_CHUNKS, Case, Results, cases, run

LINEAR = [case for case in cases() if case.function != "logprob"]
LOSSES = [case for case in cases() if case.function == "linear_dapo_loss"]
SIZES = pytest.mark.parametrize("size", [2, 4])
# Shards add the same terms in another order: some tens of roundings of values up to 30. Statistics
# are float32 always.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
}


@SIZES
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_sharded_loss_equals_whole(by_rank: list[dict[Any, Any]], size: int, case: Case) -> None:
    """Loss and every statistic on every rank, and each rank's gradient of the weight."""
    whole = run(case, None)
    shards = whole["gradients"]["weight"].chunk(size)
    for rank, results in enumerate(by_rank):
        found: Results = results[size, case]
        torch.testing.assert_close(found["outputs"], whole["outputs"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            found["outputs"]["loss"], whole["outputs"]["loss"], **TOLERANCE[case.dtype]
        )
        torch.testing.assert_close(
            found["gradients"]["weight"], shards[rank % size], **TOLERANCE[case.dtype]
        )


def hidden_gradients(by_rank: list[dict[Any, Any]], size: int, case: Case) -> list[Tensor]:
    return [results[size, case]["gradients"]["hidden"] for results in by_rank]


@SIZES
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_trap_19_gradient_of_hidden(by_rank: list[dict[Any, Any]], size: int, case: Case) -> None:
    """all_reduce: whole on each; partial: whole if summed; reduce_scatter: a part of the whole."""
    whole = run(case, None)["gradients"]["hidden"]
    found = hidden_gradients(by_rank, size, case)
    expected = {
        "all_reduce": lambda _: whole,
        "partial": lambda _: whole,
        "reduce_scatter": lambda rank: whole.chunk(size)[rank % size],
    }[case.hidden_grad]
    for rank, gradient in enumerate(found):
        first = rank // size * size
        complete = sum(found[first : first + size]) if case.hidden_grad == "partial" else gradient
        torch.testing.assert_close(complete, expected(rank), **TOLERANCE[case.dtype])


@SIZES
@pytest.mark.parametrize("function", ["linear_logprob", "linear_dapo_loss"])
def test_trap_19_one_rank_is_not_enough(
    by_rank: list[dict[Any, Any]], size: int, function: str
) -> None:
    """Negative control: neither one part, nor a whole that is summed once more, would pass."""
    whole = run(Case(function), None)["gradients"]["hidden"]
    part = hidden_gradients(by_rank, size, Case(function, hidden_grad="partial"))[0]
    summed = hidden_gradients(by_rank, size, Case(function, hidden_grad="all_reduce"))[0] * size
    for wrong in (part, summed):
        with pytest.raises(AssertionError, match="not close"):
            torch.testing.assert_close(wrong, whole, **TOLERANCE[torch.float64])


@SIZES
def test_all_ranks_hold_the_same_bits(by_rank: list[dict[Any, Any]], size: int) -> None:
    for case in LINEAR:
        for rank, results in enumerate(by_rank):
            first, found = by_rank[0][size, case], results[size, case]
            for name, value in found["outputs"].items():
                assert torch.equal(value, first["outputs"][name]), (case, rank, name)
            if case.hidden_grad == "all_reduce":
                assert torch.equal(found["gradients"]["hidden"], first["gradients"]["hidden"])


@SIZES
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_kind_and_number_of_collectives(
    by_rank: list[dict[Any, Any]], size: int, case: Case
) -> None:
    """linear_logprob gathers statistics once, linear_dapo_loss chunk by chunk, in the forward.

    Sequence parallelism adds a gather of hidden. The gradient of hidden is summed chunk by chunk,
    or scattered once: by linear_logprob in the backward, by linear_dapo_loss in the forward.
    """
    is_loss = case.function == "linear_dapo_loss"
    num_chunks = 2 if case.is_subset else NUM_CHUNKS
    gathers = (num_chunks if is_loss else 1) + (case.hidden_grad == "reduce_scatter")
    sums = {
        "all_reduce": {"all_reduce": num_chunks},
        "partial": {},
        "reduce_scatter": {"reduce_scatter_tensor": 1},
    }[case.hidden_grad]
    forward = {"all_gather_into_tensor": gathers, **(sums if is_loss else {})}
    for results in by_rank:
        assert results[size, case]["forward"] == forward
        assert results[size, case]["backward"] == ({} if is_loss else sums)


@SIZES
def test_no_token_needs_no_collective(by_rank: list[dict[Any, Any]], size: int) -> None:
    for results in by_rank:
        found = results["no token", size, "linear_dapo_loss"]
        assert found["forward"] == found["backward"] == {}
        assert found["outputs"]["loss"] == 0
        assert (found["gradients"]["weight"] == 0).all()


@SIZES
def test_trap_22_ratio_to_scored_logprobs_is_exactly_one(
    by_rank: list[dict[Any, Any]], size: int
) -> None:
    assert all(results["scoring", size]["ratio_max_diff"] == 0 for results in by_rank)
