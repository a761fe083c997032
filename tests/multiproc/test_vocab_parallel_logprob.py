"""Vocab-parallel log-probs over 2 and 4 gloo processes against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vocab_parallel_world import TOKENS, Case, Results, cases, run, tensors

LOGPROBS = [case for case in cases() if case.function != "linear_dapo_loss"]
SIZES = pytest.mark.parametrize("size", [2, 4])
# Shards add the same terms in another order: some tens of roundings of values up to 30.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
}


@SIZES
@pytest.mark.parametrize("case", LOGPROBS, ids=str)
def test_sharded_equals_whole(by_rank: list[dict[Any, Any]], size: int, case: Case) -> None:
    """Values on every rank, and each rank's rows of the gradient of the weight."""
    whole = run(case, None)
    shards = whole["gradients"]["weight"].chunk(size)
    for rank, results in enumerate(by_rank):
        found: Results = results[size, case]
        torch.testing.assert_close(found["outputs"], whole["outputs"], **TOLERANCE[case.dtype])
        torch.testing.assert_close(
            found["gradients"]["weight"], shards[rank % size], **TOLERANCE[case.dtype]
        )


@SIZES
def test_all_ranks_hold_the_same_bits(by_rank: list[dict[Any, Any]], size: int) -> None:
    """Each rank decides on clipping by itself; they must decide alike."""
    for case in LOGPROBS:
        first = by_rank[0][size, case]["outputs"]
        for results in by_rank[1:]:
            found = results[size, case]["outputs"]
            assert all(torch.equal(value, first[name]) for name, value in found.items()), case


@SIZES
def test_one_shard_is_not_enough(by_rank: list[dict[Any, Any]], size: int) -> None:
    """Negative control: a softmax over one shard's columns is far from the whole one."""
    case = Case("logprob")
    values = tensors(case)
    logits = values["hidden"] @ values["weight"][: 32 // size].t() / 0.8
    ids = values["token_ids"].clamp(max=32 // size - 1)
    alone = torch.log_softmax(logits, -1)[torch.arange(TOKENS), ids]
    is_here = values["token_ids"] == ids
    found = by_rank[0][size, case]["outputs"]["logprobs"]
    assert (found - alone)[is_here].abs().min() > 0.01


@SIZES
def test_one_collective_forward_and_none_backward(by_rank: list[dict[Any, Any]], size: int) -> None:
    for results in by_rank:
        for case in LOGPROBS:
            if case.function == "logprob":
                assert results[size, case]["forward"] == {"all_gather_into_tensor": 1}
                assert results[size, case]["backward"] == {}
        assert results["scoring", size]["calls"] == {"all_gather_into_tensor": 1}


@SIZES
@pytest.mark.parametrize("function", ["logprob", "linear_logprob"])
def test_no_token_needs_no_collective(
    by_rank: list[dict[Any, Any]], size: int, function: str
) -> None:
    for results in by_rank:
        found = results["no token", size, function]
        assert found["forward"] == found["backward"] == {}
        assert found["outputs"]["logprobs"].shape == (0,)
        assert found["gradients"]["hidden"].shape == (0, 16)
        assert (found["gradients"]["weight"] == 0).all()


@SIZES
def test_vocabulary_that_does_not_fit_is_refused(by_rank: list[dict[Any, Any]], size: int) -> None:
    sentence = f"valid_vocab is 33, expected 1 to 32 ({size} ranks of {32 // size} columns)"
    assert all(sentence in results["refusal", size] for results in by_rank)
