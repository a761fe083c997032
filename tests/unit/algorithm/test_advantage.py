"""Group-relative advantages, and the order of filtering and shaping."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_hpc.buffer.group import uniform_state
from dapo_hpc.config import AdvantageSection, RewardSection
from dapo_hpc.learner.advantage import group_advantages
from dapo_hpc.reward.overlong import shaped_reward

DEFAULT = AdvantageSection()
EXACT = AdvantageSection(eps=0.0)


def test_one_success_among_sixteen() -> None:
    """Mean -0.875, standard deviation with ddof 1 exactly 0.5."""
    rewards = np.array([1.0] + [-1.0] * 15)
    assert group_advantages(rewards, EXACT).tolist() == [3.75] + [-0.25] * 15
    np.testing.assert_allclose(
        group_advantages(rewards, DEFAULT), [3.75 / (1 + 2e-6)] + [-0.25 / (1 + 2e-6)] * 15
    )


def test_ddof_0_is_another_number() -> None:
    rewards = np.array([1.0] + [-1.0] * 15)
    result = group_advantages(rewards, AdvantageSection(ddof=0, eps=0.0))
    np.testing.assert_allclose(result, [15**0.5] + [-(15**-0.5)] * 15, rtol=1e-14)


def test_without_scale_the_mean_is_taken_off() -> None:
    rewards = np.array([1.0, -1.0, -1.0, -1.5])
    result = group_advantages(rewards, AdvantageSection(scale="none"))
    np.testing.assert_allclose(result, rewards + 0.625)


def test_mean_includes_the_response_itself() -> None:
    """Not leave-one-out: that would give a group of [1, 0] the advantages 1 and -1 unscaled."""
    result = group_advantages(np.array([1.0, 0.0]), AdvantageSection(scale="none"))
    assert result.tolist() == [0.5, -0.5]


@given(st.lists(st.floats(-3, 1), min_size=2, max_size=16))
def test_equals_the_textbook_formula(rewards: list[float]) -> None:
    spread = statistics.stdev(rewards)
    if spread < 1e-3:
        return
    mean = statistics.fmean(rewards)
    expected = [(reward - mean) / (spread + 1e-6) for reward in rewards]
    np.testing.assert_allclose(
        group_advantages(np.array(rewards), DEFAULT), expected, rtol=1e-9, atol=1e-9
    )


@given(st.floats(-2, 1), st.integers(1, 16))
def test_equal_rewards_give_exactly_zero(reward: float, size: int) -> None:
    """Whatever rounding does to their mean, and without eps."""
    result = group_advantages(np.full(size, reward), EXACT)
    assert result.tolist() == [0.0] * size


def test_rounding_would_make_equal_rewards_differ() -> None:
    """Why the test above is by equality: the formula alone gives them full-size advantages."""
    rewards = np.full(3, 0.1)
    spread = rewards.std(ddof=1)
    assert spread > 0
    assert np.abs((rewards - rewards.mean()) / spread).max() > 0.5


@pytest.mark.parametrize("rewards", [[1.0, float("nan")], [float("inf"), 0.0], [[1.0], [2.0]]])
def test_refused_with_a_sentence(rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="must be finite numbers"):
        group_advantages(np.array(rewards), DEFAULT)


@pytest.mark.parametrize("size", [2, 4, 16])
def test_only_mixed_groups_are_informative(size: int) -> None:
    for correct in range(size + 1):
        state = uniform_state(index < correct for index in range(size))
        assert state == {0: "all_wrong", size: "all_correct"}.get(correct)


def test_one_success_survives_the_filter() -> None:
    assert uniform_state([True, False, False, False]) is None


def test_all_correct_group_of_different_lengths_is_dropped() -> None:
    """The filter looks at outcomes: overlong punishments alone must not make a group trainable."""
    config = RewardSection(overlong_cache_tokens=4096)
    lengths = (100, 17000, 19000, 20480)
    rewards = [shaped_reward(True, n, config, max_response_tokens=20480) for n in lengths]
    assert len(set(rewards)) == 4
    assert np.abs(group_advantages(np.array(rewards), DEFAULT)).max() > 0.5
    assert uniform_state([True] * 4) == "all_correct"
