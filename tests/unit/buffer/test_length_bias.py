"""A batch has the lengths of what was dispatched, not of what was quick (I8)."""

from __future__ import annotations

import random
import statistics

import pytest

from tests.buffer_world import World, make_prompts

NUM_STEPS = 120
GROUPS = 8
ROOM = 0.12
"""Relative difference of means allowed: three standard errors of 960 groups."""


def mean_lengths(*, is_preempted: bool, closing: str = "dispatch_order") -> tuple[float, float]:
    """(used, dispatched) mean tokens when short responses finish first.

    The length is drawn anew with each dispatch, as sampling does. With preemption an actor is lost
    now and then, a long response more often; the next one goes on with the same group.
    """
    world = World(
        make_prompts(5000),
        prompts_per_step=GROUPS,
        total_steps=NUM_STEPS + 1,
        closing=closing,
    )
    world.start()
    draw = random.Random(5)
    length: dict[int, int] = {}
    used: list[int] = []
    for step in range(1, NUM_STEPS + 1):
        while world.take(step).groups is None:
            leases = world.lease(free=1000)
            for lease in leases:
                length.setdefault(lease.group_id, draw.choice([10, 20, 40, 80, 400]))
            leases.sort(key=lambda lease: length[lease.group_id])
            for lease in leases:
                if is_preempted and draw.random() < length[lease.group_id] / 800:
                    world.release(lease.lease_id, is_failure=False)
                elif world.take(step).groups is None:
                    is_uniform = draw.random() < 0.3
                    outcomes = [True, is_uniform]
                    world.answer(lease, outcomes, num_tokens=length[lease.group_id])
        for group in world.take(step).groups or []:
            used.append(length[group.group_id])
        world.publish(step)
    return statistics.mean(used), statistics.mean(length.values())


@pytest.mark.parametrize("is_preempted", [False, True])
def test_used_lengths_are_those_dispatched(is_preempted: bool) -> None:
    used, dispatched = mean_lengths(is_preempted=is_preempted)
    assert used == pytest.approx(dispatched, rel=ROOM)


def test_first_finished_are_short() -> None:
    """Negative control: the other rule keeps the short responses, as its documentation says."""
    used, dispatched = mean_lengths(is_preempted=False, closing="first_finished")
    assert used < dispatched * (1 - 2 * ROOM)
