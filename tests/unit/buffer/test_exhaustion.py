"""Prompts that run out, groups that are all uniform: each configured behavior, and what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dapo_hpc.buffer.exhaustion import REPEAT_S, UNIFORM_BATCHES
from tests.buffer_world import World, make_prompts


def answer_all(world: World, outcomes: list[bool]) -> int:
    leases = world.lease(free=100)
    for lease in leases:
        world.answer(lease, outcomes)
    return len(leases)


def said(world: World, words: str) -> list[str]:
    return [notice for notice in world.notices if words in notice]


def test_next_pass_begins_and_is_said_with_what_the_last_one_brought() -> None:
    world = World(make_prompts(4), prompts_per_step=3)
    world.start()
    for step in (1, 2, 3):
        world.fill(step)
        world.publish(step)
    notice = said(world, "over the 4 prompts is used up")[0]
    assert "pass 1 over" in notice
    assert "pass 2 begins" in notice
    assert world.core.book.state.cursor > 4
    assert world.core.check() == []


def test_passes_without_one_informative_group_go_on_and_are_said_now_and_then() -> None:
    """The log is not flooded: one notice, then one each ten minutes that counts the others."""
    world = World(make_prompts(4))
    world.start()
    for _ in range(30):
        assert answer_all(world, [True, True]) > 0, "the run goes on sampling"
    passes = world.core.book.state.passes
    assert passes > 10
    assert len(said(world, "is used up")) == 1
    assert "0 groups were informative" in said(world, "is used up")[0]
    world.tick(REPEAT_S)
    while len(said(world, "is used up")) < 2:
        answer_all(world, [False, False])
    assert f"the same {passes - 2} times in between" in said(world, "is used up")[1]
    assert world.take(1).groups is None
    assert world.core.check() == []


def test_many_uniform_groups_are_said_at_each_doubling() -> None:
    world = World(make_prompts(5000))
    world.start()
    while len(said(world, "groups finished and")) < 4:
        answer_all(world, [False, False])
    counts = [int(x.split(": ")[1].split(" ")[0]) for x in said(world, "groups finished and")]
    assert counts[0] >= UNIFORM_BATCHES * 2
    assert all(later >= 2 * earlier for earlier, later in zip(counts, counts[1:], strict=False))
    assert f"(0 all correct, {counts[0]} all wrong)" in said(world, "groups finished and")[0]
    world.fill(1)
    world.publish(1)
    num_said = len(said(world, "groups finished and"))
    world.fill(2)
    assert len(said(world, "groups finished and")) == num_said, "the next step begins anew"


def test_without_dynamic_sampling_uniform_groups_are_trained_and_nothing_is_said() -> None:
    world = World(make_prompts(5000), dynamic_sampling=False)
    world.start()
    for step in range(1, 20):
        while world.take(step).groups is None:
            answer_all(world, [True, True])
        world.publish(step)
    assert world.notices == []


def test_a_smaller_batch_says_how_small() -> None:
    world = World(make_prompts(3), on_exhausted="smaller_batch")
    world.start()
    leases = world.lease()
    world.answer(leases[0], [True, False])
    for lease in leases[1:]:
        world.answer(lease, [True, True])
    groups = world.take(1).groups
    assert groups is not None
    assert len(groups) == 1
    notice = said(world, "'smaller_batch'")[0]
    assert "step 1 has 1 of 2 groups" in notice
    assert "trains on 1." in notice


def test_a_smaller_batch_of_nothing_is_another_pass() -> None:
    world = World(make_prompts(3), on_exhausted="smaller_batch")
    world.start()
    for _ in range(5):
        assert answer_all(world, [True, True]) == 3
    assert world.take(1).groups is None
    assert len(said(world, "there is nothing to train, so another pass begins")) == 1
    world.fill(1)
    assert world.core.check() == []


def test_waiting_is_said_again_with_its_length_and_ends_by_config() -> None:
    world = World(make_prompts(2), on_exhausted="wait")
    world.start()
    answer_all(world, [True, True])
    world.tick(REPEAT_S * 3 + 60)
    waits = said(world, "so the run waits")
    assert len(waits) == 4
    assert "It has waited" not in waits[0]
    assert [f"{minutes} minutes" in waits[i] for i, minutes in ((1, 10), (2, 20), (3, 30))] == [
        True
    ] * 3
    assert answer_all(world, [True, True]) == 0
    world.settings = replace(world.settings, on_exhausted="next_pass")
    world.crash()
    assert answer_all(world, [True, False]) > 0
    assert world.take(1).groups is not None


# parked prompts


def park(world: World, row: int) -> None:
    for _ in range(50):
        for lease in world.lease(free=100):
            if lease.prompt.row == row:
                world.release(lease.lease_id, is_failure=True)
            else:
                world.answer(lease, [True, True])
        if row in world.core.book.state.parked_rows:
            return
    raise AssertionError(f"row {row} is not parked")


def test_a_parked_prompt_is_passed_over_in_every_later_pass() -> None:
    world = World(make_prompts(4))
    world.start()
    park(world, 2)
    world.crash()
    rows = set()
    for _ in range(12):
        leases = world.lease(free=100)
        rows |= {lease.prompt.row for lease in leases}
        for lease in leases:
            world.answer(lease, [True, True])
    assert rows == {0, 1, 3}
    assert world.core.book.state.passes > 3
    assert world.core.book.state.counters["train_parked"] >= world.core.book.state.passes - 1
    assert len(said(world, "it is parked")) == 1
    assert world.core.check() == []


@pytest.mark.parametrize("on_exhausted", ["next_pass", "smaller_batch", "wait"])
def test_when_every_prompt_is_parked_the_run_waits_and_says_so(on_exhausted: str) -> None:
    world = World(make_prompts(2), on_exhausted=on_exhausted)
    world.start()
    for _ in range(20):
        for lease in world.lease(free=100):
            world.release(lease.lease_id, is_failure=True)
    assert set(world.core.book.state.parked_rows) == {0, 1}
    world.tick(10)
    assert world.lease(free=100) == []
    assert said(world, "all 2 prompts are parked") or said(world, "so the run waits")
    assert world.core.check() == []
