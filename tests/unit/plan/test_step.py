"""Counts of a rollout step, against the plan that the learner makes of a real batch."""

from __future__ import annotations

import pytest

from dapo_hpc.config import RunConfig, parse
from dapo_hpc.plan.step import count_step
from dapo_hpc.records import GroupSummary


def config_of(**learner: int) -> RunConfig:
    return parse(
        {
            "run": {"name": "r", "total_steps": 1},
            "model": {"path": "m"},
            "prompts": {"train": "a", "eval": "b", "max_tokens": 10},
            "rollout": {"prompts_per_step": 7, "group_size": 4, "max_response_tokens": 90},
            "reward": {"overlong_punishment": False},
            "learner": {"mini_batches": 3, **learner},
        }
    )


def groups_of(config: RunConfig, num_tokens: int) -> list[GroupSummary]:
    """A batch whose prompts are at their limit, every response of the same length."""
    size = config.rollout.group_size
    return [
        GroupSummary(
            group_id=number,
            prompt_row=number,
            num_prompt_tokens=config.prompts.max_tokens,
            num_tokens=(num_tokens,) * size,
            rewards=(0.0,) * size,
            is_correct=(False,) * size,
            is_truncated=(False,) * size,
            min_step=0,
            max_step=0,
        )
        for number in range(config.rollout.prompts_per_step)
    ]


@pytest.mark.parametrize("budget", [50, 100, 250, 1000])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_counts_are_those_of_the_learner(budget: int, replicas: int) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    from dapo_hpc.learner.packing import plan_step

    config = config_of(micro_batch_tokens=budget, data_parallel=replicas)
    counts = count_step(config)
    for limit, planned in ((90, counts.max_micro_batches), (45, counts.half_micro_batches)):
        mini_batches = plan_step(
            groups_of(config, limit),
            mini_batches=3,
            micro_batch_tokens=budget,
            data_parallel=replicas,
            seed=0,
        ).mini_batches
        assert max(len(rank) for mini in mini_batches for rank in mini.ranks) == planned
        assert max(len(mini.groups) for mini in mini_batches) * 4 == counts.responses_per_update
        tokens = [
            sum(len(micro) for mini in mini_batches for micro in mini.ranks[rank]) * (10 + limit)
            for rank in range(replicas)
        ]
        if limit == 90:
            assert sum(tokens) == counts.max_tokens
            # Dealt evenly by number, so the rank with most may have one response more an update.
            assert max(tokens) <= counts.max_rank_tokens <= max(tokens) + 3 * 4 * 100


def test_counts_of_the_published_run() -> None:
    table = config_of().model_dump(mode="json", exclude_none=True)
    table["prompts"]["max_tokens"] = 2048
    table["rollout"] |= {"prompts_per_step": 512, "group_size": 16, "max_response_tokens": 20480}
    table["learner"] |= {"mini_batches": 16, "data_parallel": 4, "micro_batch_tokens": 22528}
    counts = count_step(parse(table))
    assert (counts.responses, counts.responses_per_update, counts.updates) == (8192, 512, 16)
    assert counts.max_tokens == 8192 * 22528
    assert counts.half_tokens == 8192 * (2048 + 10240)
    assert counts.max_rank_tokens == 2048 * 22528
    assert counts.max_micro_batches == 128
