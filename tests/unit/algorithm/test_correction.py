"""Mismatch figures against plain arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from random_batches import random_batch

from dapo_hpc.learner.correction import (
    Mismatch,
    measure_mismatch,
    non_finite_tokens,
)
from dapo_hpc.learner.packing import plan_step

CAP = 2.0


def draw(num_tokens: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rollout = -torch.rand(num_tokens, generator=generator) * 3
    old = rollout + torch.randn(num_tokens, generator=generator)
    return old, rollout, torch.rand(num_tokens, generator=generator) > 0.3


def literal_metrics(differences: list[float]) -> dict[str, float]:
    ratios = [math.exp(d) for d in differences]
    weights = [min(ratio, CAP) for ratio in ratios]
    count = len(differences)
    return {
        "mismatch/mean_diff": sum(map(abs, differences)) / count,
        "mismatch/max_diff": max(map(abs, differences)),
        "mismatch/kl": sum(math.exp(d) - d - 1 for d in differences) / count,
        "mismatch/ess_frac": sum(weights) ** 2 / (count * sum(w * w for w in weights)),
        "mismatch/capped_frac": sum(ratio >= CAP for ratio in ratios) / count,
    }


def test_metrics_are_those_of_the_formulas() -> None:
    old, rollout, mask = draw()
    differences = (old.double() - rollout.double())[mask].tolist()
    found = measure_mismatch(old, rollout, mask, cap=CAP).metrics()
    # The difference is taken in float32: one rounding of numbers below 8.
    assert found == pytest.approx(literal_metrics(differences), rel=1e-6)
    assert found != pytest.approx(literal_metrics((old - rollout).tolist()), rel=1e-3)


@pytest.mark.parametrize("cap", [CAP, 0.5])
def test_masked_tokens_may_hold_anything(cap: float) -> None:
    old, rollout, mask = draw()
    clean = measure_mismatch(old[mask], rollout[mask], mask[mask], cap=cap).metrics()
    old[~mask], rollout[~mask] = math.nan, -math.inf
    found = measure_mismatch(old, rollout, mask, cap=cap).metrics()
    assert found == pytest.approx(clean, rel=1e-12)


def test_merged_parts_are_the_whole() -> None:
    old, rollout, mask = draw()
    whole = measure_mismatch(old, rollout, mask, cap=CAP).metrics()
    merged = Mismatch.empty()
    for part in (slice(0, 7), slice(7, 7), slice(7, 200), slice(200, None)):
        merged = merged.merge(measure_mismatch(old[part], rollout[part], mask[part], cap=CAP))
    assert merged.metrics() == pytest.approx(whole, rel=1e-12)


def test_no_token_gives_no_figures() -> None:
    old, rollout, mask = draw()
    assert Mismatch.empty().metrics() == {}
    assert measure_mismatch(old, rollout, torch.zeros_like(mask), cap=CAP).metrics() == {}


def test_same_policy_gives_no_mismatch() -> None:
    old, _, mask = draw()
    assert measure_mismatch(old, old, mask, cap=CAP).metrics() == {
        "mismatch/mean_diff": 0.0,
        "mismatch/max_diff": 0.0,
        "mismatch/kl": 0.0,
        "mismatch/ess_frac": 1.0,
        "mismatch/capped_frac": 0.0,
    }


def test_expected_kl_is_recovered() -> None:
    """k3 over samples of the engine's policy estimates KL(engine || learner)."""
    generator = np.random.default_rng(0)
    engine, learner = np.array([0.5, 0.3, 0.2]), np.array([0.3, 0.3, 0.4])
    drawn = torch.from_numpy(generator.choice(3, 200_000, p=engine))
    old, rollout = (torch.from_numpy(np.log(p)).float()[drawn] for p in (learner, engine))
    everything = torch.ones(len(drawn), dtype=torch.bool)
    found = measure_mismatch(old, rollout, everything, cap=CAP).metrics()["mismatch/kl"]
    # The standard error of the mean is 0.0004.
    assert found == pytest.approx(float((engine * np.log(engine / learner)).sum()), abs=0.002)


def test_ranks_together_count_every_dropped_token() -> None:
    batch = random_batch(6, 4, 3, non_finite_frac=0.3)
    plan = plan_step(
        batch.summaries, mini_batches=2, micro_batch_tokens=40, data_parallel=3, seed=0
    )
    total = np.zeros(batch.shape, dtype=np.int64)
    for rank in range(3):
        members = [member for mini in plan.mini_batches for m in mini.ranks[rank] for member in m]
        part = non_finite_tokens(members, batch.groups, batch.shape)
        others = set(np.ndindex(batch.shape)) - set(members)
        assert all(part[member] == 0 for member in others)
        total += part
    for position, group in batch.groups.items():
        for index, response in enumerate(group.responses):
            expected = sum(not math.isfinite(value) for value in response.rollout_logprobs.tolist())
            assert total[position, index] == expected
    assert total.sum() > 0
