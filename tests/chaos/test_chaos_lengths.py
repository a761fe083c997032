"""I8: kills change neither which tokens are trained nor how long the responses are.

What a kill takes is the tokens since the last heartbeat, and those are sampled again from where the
heartbeat ended. Exactly unbiased that is only as the interval goes to zero: a response that ended
within the interval was sent and is kept, one that went on is set back. So a kill shortens the mean
by half an interval at most; the interval here is short against the responses, as in a run.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np

from tests.buffer_world import SMALL
from tests.chaos.actors import LONG, Habits, Policy
from tests.chaos.learner import Course
from tests.chaos.network import Trouble
from tests.chaos.plants import planted
from tests.chaos.world import FaultName, Scenario, run_seed

NUM_STEPS = 14
STANDARD_ERRORS = 3.5
KS_LIMIT = 1.95
"""Kolmogorov-Smirnov: exceeded once in 1000 pairs of samples of one distribution."""


def scenario(*, is_killed: bool) -> Scenario:
    """Half of the responses are long; when actors are killed, most long ones are hit."""
    gaps: dict[FaultName, float] = {"actor killed": 0.7} if is_killed else {}
    return Scenario(
        settings=replace(
            SMALL,
            total_steps=NUM_STEPS,
            prompts_per_step=32,
            group_size=4,
            dynamic_sampling=False,
            lease_s=3.0,
            max_attempts=1000,
        ),
        num_prompts=500,
        num_actors=4,
        policy=Policy(mean_short=12.0, mean_long=90.0, tokens_per_s=30.0),
        habits=Habits(max_responses=40, heartbeat_s=0.2),
        course=Course(total_steps=NUM_STEPS, train_s=0.2, poll_s=0.2),
        checkpoint_every=4,
        trouble=Trouble(),
        fault_gaps_s=gaps,
        trouble_s=math.inf,
        check_every=100,
    )


@cache
def trained(*, is_killed: bool, plant: str | None = None) -> tuple[np.ndarray, ...]:
    """The tokens of every trained response."""
    with planted(plant):
        verdict = run_seed(3, scenario(is_killed=is_killed), is_sampled=True)
    assert plant is not None or verdict.problems == []
    assert not is_killed or verdict.counts["responses continued"] > 100 or plant is not None
    assert verdict.history.samples is not None
    return tuple(verdict.history.samples)


def lengths(samples: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.array([len(tokens) for tokens in samples])


def mean_shift(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Difference of means in standard errors."""
    error = math.sqrt(ours.var() / len(ours) + theirs.var() / len(theirs))
    return float((ours.mean() - theirs.mean()) / error)


def ks_distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Scaled so that KS_LIMIT applies."""
    at = np.union1d(ours, theirs)
    shares = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (ours, theirs)]
    size = len(ours) * len(theirs) / (len(ours) + len(theirs))
    return float(np.abs(shares[0] - shares[1]).max() * math.sqrt(size))


def is_long(samples: tuple[np.ndarray, ...]) -> np.ndarray:
    """[n] float: whether the first token chose LONG; 1 or 0."""
    return np.array([float(tokens[0] == LONG) for tokens in samples])


def later_tokens(samples: tuple[np.ndarray, ...]) -> np.ndarray:
    """Every token behind the first of each response."""
    return np.concatenate([tokens[1:] for tokens in samples])


def test_kills_change_neither_lengths_nor_tokens() -> None:
    calm, killed = trained(is_killed=False), trained(is_killed=True)
    assert len(calm) == len(killed) == NUM_STEPS * 32 * 4
    assert abs(mean_shift(lengths(killed), lengths(calm))) < STANDARD_ERRORS
    assert ks_distance(lengths(killed), lengths(calm)) < KS_LIMIT
    assert abs(mean_shift(is_long(killed), is_long(calm))) < STANDARD_ERRORS
    assert ks_distance(later_tokens(killed), later_tokens(calm)) < KS_LIMIT


def test_the_policy_is_what_it_should_be() -> None:
    """Independent truth: a geometric length behind a fair coin."""
    calm = trained(is_killed=False)
    policy = scenario(is_killed=False).policy
    expected = 1 + (policy.mean_short + policy.mean_long) / 2
    error = lengths(calm).std() / math.sqrt(len(calm))
    assert abs(lengths(calm).mean() - expected) < STANDARD_ERRORS * error
    assert abs(is_long(calm).mean() - 0.5) < STANDARD_ERRORS * 0.5 / math.sqrt(len(calm))


def test_redrawing_killed_groups_would_shorten_them() -> None:
    """Negative control: what is lost with an actor is sampled from scratch."""
    calm = trained(is_killed=False)
    redrawn = trained(is_killed=True, plant="killed group redrawn from scratch")
    assert mean_shift(lengths(redrawn), lengths(calm)) < -2 * STANDARD_ERRORS
    assert ks_distance(lengths(redrawn), lengths(calm)) > KS_LIMIT
    assert mean_shift(is_long(redrawn), is_long(calm)) < -STANDARD_ERRORS
