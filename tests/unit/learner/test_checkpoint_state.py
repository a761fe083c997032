"""Runs of a flattened matrix as boxes."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from hypothesis import given
from hypothesis import strategies as st

from dapo_hpc.learner.checkpoint_state import Box, boxes


@given(st.integers(1, 12), st.integers(0, 60), st.integers(0, 60))
def test_boxes_are_the_run_in_order(width: int, start: int, length: int) -> None:
    found = list(boxes(start, start + length, width))
    numbers = [
        (box.row + i) * width + box.column + j
        for box in found
        for i in range(box.rows)
        for j in range(box.columns)
    ]
    assert numbers == list(range(start, start + length))
    assert len(found) <= 3
    assert all(box.size > 0 and box.column + box.columns <= width for box in found)
    assert all(box.rows == 1 or box.columns == width for box in found), "each is one run"


def test_whole_rows_are_one_box() -> None:
    assert list(boxes(0, 12, 4)) == [Box(0, 0, 3, 4)]
    assert list(boxes(2, 11, 4)) == [Box(0, 2, 1, 2), Box(1, 0, 1, 4), Box(2, 0, 1, 3)]
    assert list(boxes(5, 7, 4)) == [Box(1, 1, 1, 2)]
    assert list(boxes(5, 5, 4)) == []
