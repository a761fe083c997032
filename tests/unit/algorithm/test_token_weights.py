"""The four denominators, by literal means of means; and what counts as a trained token."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from dapo_hpc.learner.packing import Normalization, token_weights, trained_tokens
from dapo_hpc.records import GroupSummary

LIMIT = 50
ALL: tuple[Normalization, ...] = (
    "global_tokens",
    "per_prompt",
    "per_sequence",
    "per_sequence_const",
)
counts_arrays = st_numpy.arrays(
    np.int64, st.tuples(st.integers(1, 5), st.integers(1, 4)), elements=st.integers(0, LIMIT)
)


def literal_loss(losses: list[list[list[float]]], normalization: Normalization) -> float:
    """losses[g][i][t] of trained tokens only; the formulas as means, empty ones left out."""
    groups = [[tokens for tokens in group if tokens] for group in losses]
    groups = [group for group in groups if group]
    responses = [tokens for group in groups for tokens in group]
    if not responses:
        return 0.0
    if normalization == "global_tokens":
        return fmean(loss for tokens in responses for loss in tokens)
    if normalization == "per_prompt":
        return fmean(fmean(loss for tokens in group for loss in tokens) for group in groups)
    if normalization == "per_sequence":
        return fmean(fmean(tokens) for tokens in responses)
    return fmean(sum(tokens) / LIMIT for tokens in responses)


@pytest.mark.parametrize("normalization", ALL)
@given(counts=counts_arrays, seed=st.integers(0, 2**32 - 1))
def test_weighted_sum_is_the_literal_mean(
    normalization: Normalization, counts: np.ndarray, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    losses = [[generator.normal(size=n).tolist() for n in row] for row in counts]
    weights = token_weights(counts, normalization, max_response_tokens=LIMIT)
    total = sum(
        weights[g, i] * sum(tokens)
        for g, group in enumerate(losses)
        for i, tokens in enumerate(group)
    )
    assert total == pytest.approx(literal_loss(losses, normalization), rel=1e-12, abs=1e-12)


@given(counts=counts_arrays)
def test_denominators_sum_to_one(counts: np.ndarray) -> None:
    """Summed over trained tokens the weights of a mean are 1; without any token all are 0."""
    for normalization in ALL[:3]:
        weights = token_weights(counts, normalization, max_response_tokens=LIMIT)
        expected = 1.0 if counts.any() else 0.0
        assert (weights * counts).sum() == pytest.approx(expected, rel=1e-12)
        assert ((weights == 0) == (counts == 0)).all()
    constant = token_weights(counts, "per_sequence_const", max_response_tokens=LIMIT)
    expected = counts[counts > 0].mean() / LIMIT if counts.any() else 0.0
    assert (constant * counts).sum() == pytest.approx(expected, rel=1e-12)


def test_the_four_differ() -> None:
    counts = np.array([[1, 3], [4, 0]])
    found = {name: token_weights(counts, name, max_response_tokens=LIMIT).tolist() for name in ALL}
    assert found == {
        "global_tokens": [[1 / 8, 1 / 8], [1 / 8, 0]],
        "per_prompt": [[1 / 8, 1 / 8], [1 / 8, 0]],
        "per_sequence": [[1 / 3, 1 / 9], [1 / 12, 0]],
        "per_sequence_const": [[1 / 150, 1 / 150], [1 / 150, 0]],
    }
    counts[1, 0] = 12
    assert token_weights(counts, "global_tokens", max_response_tokens=LIMIT)[0, 0] == 1 / 16
    assert token_weights(counts, "per_prompt", max_response_tokens=LIMIT)[0, 0] == 1 / 8


@pytest.mark.parametrize("normalization", ALL)
def test_masked_row_adds_to_neither_side(normalization: Normalization) -> None:
    """A group or response without trained tokens might as well not be in the mini-batch."""
    counts = np.array([[5, 7], [2, 9]])
    alone = token_weights(counts, normalization, max_response_tokens=LIMIT)
    with_group = token_weights(
        np.vstack((counts, [[0, 0]])), normalization, max_response_tokens=LIMIT
    )
    with_response = token_weights(
        np.hstack((counts, [[0], [0]])), normalization, max_response_tokens=LIMIT
    )
    assert with_group.tolist() == [*alone.tolist(), [0.0, 0.0]]
    assert with_response[:, :2].tolist() == alone.tolist()
    counted = counts.copy()
    counted[1, 1] = 0
    fewer = token_weights(counted, normalization, max_response_tokens=LIMIT)
    assert fewer[0, 0] > alone[0, 0] or normalization == "per_prompt"


def summary(num_tokens: tuple[int, ...], is_truncated: tuple[bool, ...]) -> GroupSummary:
    return GroupSummary(
        group_id=0,
        prompt_row=0,
        num_prompt_tokens=3,
        num_tokens=num_tokens,
        rewards=(0.0,) * len(num_tokens),
        is_correct=(True,) * len(num_tokens),
        is_truncated=is_truncated,
        min_step=0,
        max_step=0,
    )


def test_overlong_filtering_and_dropped_tokens() -> None:
    groups = [summary((5, 50), (False, True)), summary((50, 8), (True, False))]
    dropped = np.array([[1, 2], [0, 8]])
    plain = trained_tokens(groups, overlong_filtering=False)
    assert plain.tolist() == [[5, 50], [50, 8]]
    assert trained_tokens(groups, overlong_filtering=True).tolist() == [[5, 0], [0, 8]]
    counted = trained_tokens(groups, overlong_filtering=False, dropped=dropped)
    assert counted.tolist() == [[4, 48], [50, 0]]
    both = trained_tokens(groups, overlong_filtering=True, dropped=dropped)
    assert both.tolist() == [[4, 0], [0, 0]]
    weights = token_weights(both, "per_prompt", max_response_tokens=LIMIT)
    assert weights.tolist() == [[1 / 4, 0], [0, 0]]
