"""Actors come and go without end; their figures add up and take bounded space."""

from __future__ import annotations

import pytest

from dapo_hpc.buffer import fleet as fleet_module
from dapo_hpc.buffer.fleet import GONE, GONE_LEASES, Fleet
from dapo_hpc.buffer.messages import ActorStats

LEASE_S = 10.0


def stats(number: int) -> ActorStats:
    return ActorStats(generated_tokens=number, cpu_s=float(number), peak_memory_mib=number % 7)


def test_actors_long_gone_are_kept_as_a_sum() -> None:
    fleet = Fleet(LEASE_S, 0.0, {})
    for number in range(1, 501):
        now = number * LEASE_S
        fleet.heard(f"actor-{number}", None, stats(number), now)
        metrics = fleet.metrics(now)
        assert metrics["actor/generated_tokens"] == number * (number + 1) / 2
        assert metrics["actor/peak_memory_mib"] == min(number, 6)
        assert len(fleet.stats()) <= GONE_LEASES + 3
    assert fleet.stats()[GONE].generated_tokens > 0


def test_space_is_bounded_even_if_no_incarnation_lives_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet_module, "KEPT_ACTORS", 20)
    past: dict[str, ActorStats] = {}
    for number in range(1, 101):
        fleet = Fleet(LEASE_S, 0.0, past)
        fleet.heard(f"actor-{number}", None, stats(1), 1.0)
        assert fleet.metrics(2.0)["actor/generated_tokens"] == number
        past = fleet.stats()
        assert len(past) <= 20 + 2


def test_an_actor_that_is_silent_for_a_while_is_not_counted_twice() -> None:
    fleet = Fleet(LEASE_S, 0.0, {"actor-1": stats(5)})
    assert fleet.metrics(1.0)["actor/generated_tokens"] == 5
    fleet.heard("actor-1", None, stats(8), (GONE_LEASES - 1) * LEASE_S)
    assert fleet.metrics((GONE_LEASES + 1) * LEASE_S)["actor/generated_tokens"] == 8
