"""The learning rate of every rollout step, against values worked out by hand."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

from dapo_hpc.config import ConfigProblems, OptimizerSection, parse
from dapo_hpc.learner.schedule import learning_rate


def rates(steps: list[int], total_steps: int = 12, **section: Any) -> list[float]:
    optimizer = OptimizerSection(lr=1.0, **section)
    return [learning_rate(optimizer, step, total_steps=total_steps) for step in steps]


def test_it_rises_by_rollout_step_and_stays() -> None:
    assert rates([1, 2, 4, 9, 12], warmup_steps=4) == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert rates([1, 12], warmup_steps=0) == [1.0, 1.0]


def test_verl_profile_starts_its_warm_up_at_zero() -> None:
    assert rates([1, 2, 5, 9], warmup_steps=4, first_warmup_step=0) == [0.0, 0.25, 1.0, 1.0]


@pytest.mark.parametrize(
    ("schedule", "halfway"),
    [("linear", 0.6), ("cosine", 0.6), ("constant", 1.0)],  # both fall by half of 1 - 0.2 there
)
def test_it_falls_from_the_end_of_the_warm_up_to_the_last_step(
    schedule: str, halfway: float
) -> None:
    options = {"schedule": schedule, "min_lr_frac": 0.2, "warmup_steps": 4}
    found = rates([2, 4, 8, 12], **options)
    assert found == pytest.approx([0.5, 1.0, halfway, 0.2 if halfway < 1 else 1.0])


def test_cosine_falls_slower_than_linear_at_first_and_faster_later() -> None:
    linear, cosine = (
        rates(list(range(1, 13)), schedule=schedule, warmup_steps=4)
        for schedule in ("linear", "cosine")
    )
    assert cosine[4] == pytest.approx((1 + (2 + 2**0.5) ** 0.5 / 2) / 2)  # cos(pi / 8)
    assert all(c > li for c, li in zip(cosine[4:7], linear[4:7], strict=True))
    assert all(c < li for c, li in zip(cosine[8:11], linear[8:11], strict=True))


def test_without_a_warm_up_the_first_step_has_the_whole_rate() -> None:
    for first in (0, 1):
        found = rates([1, 3, 5], 5, schedule="linear", warmup_steps=0, first_warmup_step=first)
        assert found == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize("first", [0, 1])
def test_a_config_passes_if_and_only_if_the_rate_rises_to_the_top_and_falls(first: int) -> None:
    verdicts = set()
    for warmup in range(7):
        for total in range(2, 7):
            optimizer = {
                "lr": 1.0,
                "schedule": "linear",
                "warmup_steps": warmup,
                "first_warmup_step": first,
            }
            table = {
                "run": {"name": "r", "total_steps": total},
                "model": {"path": "m"},
                "prompts": {"train": "a", "eval": "b"},
                "optimizer": optimizer,
            }
            rate = [
                learning_rate(OptimizerSection(**optimizer), step, total_steps=total)
                for step in range(1, total + 1)
            ]
            is_sound = max(rate) == 1.0 and rate[-1] == 0.0
            verdicts.add(is_sound)
            refused = pytest.raises(ConfigProblems, match="nothing is left to fall over")
            with nullcontext() if is_sound else refused:
                parse(table)
    assert verdicts == {False, True}


def test_a_resumed_run_of_more_steps_falls_over_all_of_them() -> None:
    """The rate depends on the step and the config alone, so nothing of it is in a checkpoint."""
    assert rates([6], 11, schedule="linear", warmup_steps=0) == [0.5]
    assert rates([6], 21, schedule="linear", warmup_steps=0) == [0.75]
