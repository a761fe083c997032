"""Soft overlong punishment at the paper's lengths, and the one place that makes a reward."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_hpc.config import RewardSection
from dapo_hpc.reward.overlong import overlong_punishment, shaped_reward

LENGTHS = [
    pytest.param(0, 0.0, id="nothing"),
    pytest.param(1, 0.0, id="one-token"),
    pytest.param(16383, 0.0, id="below-the-slope"),
    pytest.param(16384, 0.0, id="start-of-the-slope"),
    pytest.param(16385, -1 / 4096, id="first-punished"),
    pytest.param(18432, -0.5, id="middle"),
    pytest.param(20479, -4095 / 4096, id="last-on-the-slope"),
    pytest.param(20480, -1.0, id="limit"),
    pytest.param(20481, -1.0, id="past-the-limit"),
    pytest.param(10**9, -1.0, id="far-past-the-limit"),
]


@pytest.mark.parametrize(("num_tokens", "expected"), LENGTHS)
def test_punishment_at_the_papers_lengths(num_tokens: int, expected: float) -> None:
    found = overlong_punishment(num_tokens, max_response_tokens=20480, overlong_cache_tokens=4096)
    assert found == expected


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(1, 200), st.integers(1, 200))
def test_equals_the_three_cases_of_the_equation(length: int, limit: int, cache: int) -> None:
    cache = min(cache, limit)
    if length <= limit - cache:
        expected = Fraction(0)
    elif length <= limit:
        expected = Fraction(limit - cache - length, cache)
    else:
        expected = Fraction(-1)
    found = overlong_punishment(length, max_response_tokens=limit, overlong_cache_tokens=cache)
    assert found == float(expected)


@pytest.mark.parametrize(
    ("is_correct", "num_tokens", "expected"),
    [
        (True, 100, 1.0),
        (False, 100, -1.0),
        (True, 18432, 0.5),
        (False, 18432, -1.5),
        # Cut at the limit: the correct one earns nothing, the wrong one is punished twice.
        (True, 20480, 0.0),
        (False, 20480, -2.0),
    ],
)
def test_punishment_is_added_to_the_outcome(
    is_correct: bool, num_tokens: int, expected: float
) -> None:
    config = RewardSection(overlong_cache_tokens=4096)
    assert shaped_reward(is_correct, num_tokens, config, max_response_tokens=20480) == expected


def test_switched_off_only_the_outcome_counts() -> None:
    config = RewardSection(overlong_punishment=False)
    for num_tokens in (1, 20480):
        assert shaped_reward(True, num_tokens, config, max_response_tokens=20480) == 1.0
        assert shaped_reward(False, num_tokens, config, max_response_tokens=20480) == -1.0
