"""What is shown while a run lasts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dapo_hpc.observe.live import (
    TRAIN_COLUMNS,
    Follower,
    PlainView,
    ProcessState,
    Progress,
    TableView,
    duration_text,
)


def step_row(step: int, **values: float) -> dict[str, Any]:
    row = {"kind": "step", "step": step, "lineage": 1, "unix_s": 100.0 + 3 * step}
    return {**row, "train/accuracy": 0.5, "learner/step_s": 3.0, **values}


def append(path: Path, *rows: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_follower_gives_each_row_once_and_waits_for_the_rest_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.new_rows() == []
    append(path, step_row(1))
    assert [row["step"] for row in follower.new_rows()] == [1]
    line = json.dumps(step_row(2)) + "\n"
    with open(path, "a") as file:
        file.write(line[:20])
    assert follower.new_rows() == []
    with open(path, "a") as file:
        file.write(line[20:])
    assert [row["step"] for row in follower.new_rows()] == [2]


def test_time_left_is_steps_left_times_the_usual_step() -> None:
    progress = Progress("step", 20)
    assert progress.add(step_row(1))["left_s"] is None  # type: ignore[index]
    assert progress.add(step_row(2))["left_s"] == 18 * 3.0  # type: ignore[index]
    slow = {**step_row(3), "unix_s": 100.0 + 6 + 60}
    progress.add(slow)
    shown = progress.add({**step_row(4), "unix_s": slow["unix_s"] + 3})
    assert shown is not None
    assert shown["left_s"] == 16 * 3.0, "one slow step moved the estimate"


def test_a_step_trained_again_replaces_the_abandoned_ones() -> None:
    progress = Progress("step", 20)
    for step in (1, 2, 3, 2):
        progress.add(step_row(step))
    assert [row["step"] for row in progress.rows] == [1, 2]


def test_a_row_written_again_by_the_same_learner_is_shown_once() -> None:
    progress = Progress("step", 20)
    assert progress.add(step_row(1)) is not None
    assert progress.add(step_row(1, **{"learner/checkpoint_s": 0.5})) is None
    assert progress.rows[-1]["learner/checkpoint_s"] == 0.5
    assert progress.add({**step_row(1), "lineage": 2}) is not None


def test_plain_view_writes_one_aligned_line_for_each_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    view = PlainView(Follower(path), Progress("step", 20), TRAIN_COLUMNS)
    append(path, {"kind": "eval", "step": 0, "unix_s": 0.0, "eval/accuracy": 0.25})
    append(path, *(step_row(step) for step in range(1, 4)))
    view.update([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "held-out accuracy after step 0: 0.250"
    assert lines[1].split()[:2] == ["step", "accuracy"]
    assert [line.split()[0] for line in lines[2:]] == ["1/20", "2/20", "3/20"]
    assert {len(line) for line in lines[1:]} == {len(lines[1])}
    assert lines[2].split()[2] == "0.250"
    view.update([])
    assert capsys.readouterr().out == ""


def test_plain_view_tells_what_starts_only_until_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dapo_hpc.observe.live.PROCESS_LINE_S", 0.0)
    path = tmp_path / "metrics.jsonl"
    view = PlainView(Follower(path), Progress("step", 20), TRAIN_COLUMNS)
    starting = [ProcessState("actor-0", True, 12.0, "loading the engine")]
    view.update(starting)
    view.update(starting)
    assert capsys.readouterr().out.count("loading the engine") == 1
    append(path, step_row(1))
    view.update([ProcessState("actor-0", True, 20.0, "another line")])
    assert "another line" not in capsys.readouterr().out


def test_table_view_draws_rows_and_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, *(step_row(step) for step in range(1, 4)))
    view = TableView(Follower(path), Progress("step", 20), TRAIN_COLUMNS)
    view.update([ProcessState("buffer", False, 0.0, "no space left")])
    view.say("restart 1 of 3")
    view.close()
    text = capsys.readouterr().out
    assert "3/20" in text
    assert "restart 1 of 3" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (45, "45 s"), (720, "12 min"), (11100, "3 h 05")]
)
def test_duration_text(seconds: float | None, text: str) -> None:
    assert duration_text(seconds) == text
