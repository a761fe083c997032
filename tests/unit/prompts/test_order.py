"""The prompt order: every row once a pass, computable anywhere, the same for ever."""

from __future__ import annotations

import pytest

from dapo_hpc.prompts.order import PromptOrder


def test_each_pass_holds_every_row_once() -> None:
    order = PromptOrder(17, seed=3)
    for pass_index in range(3):
        places = [order.at(pass_index * 17 + n) for n in range(17)]
        assert {p for p, _ in places} == {pass_index}
        assert sorted(row for _, row in places) == list(range(17))


def test_passes_and_seeds_differ() -> None:
    def rows(seed: int, start: int) -> list[int]:
        return [PromptOrder(50, seed).at(start + n)[1] for n in range(50)]

    assert rows(0, 0) != rows(0, 50)
    assert rows(0, 0) != rows(1, 0)
    assert rows(0, 0) != list(range(50))


def test_any_position_can_be_asked_in_any_order() -> None:
    order = PromptOrder(10, seed=7)
    forward = [order.at(n) for n in range(40)]
    assert [PromptOrder(10, seed=7).at(n) for n in reversed(range(40))] == forward[::-1]


def test_the_order_never_changes() -> None:
    """Written down once; a run that is resumed under a newer numpy must find the same order."""
    assert [PromptOrder(8, seed=1).at(n)[1] for n in range(8)] == GOLDEN


GOLDEN = [2, 4, 7, 5, 0, 6, 3, 1]


def test_no_prompts_is_said() -> None:
    with pytest.raises(ValueError, match="0 rows"):
        PromptOrder(0, seed=0)
