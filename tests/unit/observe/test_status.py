"""`dapo status` and the picture, from files that a dead run left behind."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from dapo_hpc.config import dump, parse
from dapo_hpc.observe import report
from dapo_hpc.observe.status import status_text
from dapo_hpc.run_dir import RunDir


def step_row(step: int) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": step,
        "lineage": 1,
        "unix_s": 100.0 + step,
        "train/accuracy": 0.3 + 0.03 * step,
        "train/response_tokens_mean": 8.0 + step,
        "learner/entropy": 0.4 / step,
        "buffer/kept_frac": 0.9,
        "mismatch/mean_diff": 1e-7,
        "mismatch/max_diff": 1e-5,
        **{f"learner/{part}_s": 0.5 for part in report.PARTS},
    }


def eval_row(step: int, accuracy: float) -> dict[str, Any]:
    values = {"eval/accuracy": accuracy, "eval/response_tokens_mean": 9.0}
    return {"kind": "eval", "step": step, "lineage": 1, "unix_s": 100.0, **values}


@pytest.fixture
def dead_run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "r")
    for directory in (run.logs, run.buffer, run.checkpoints):
        directory.mkdir(parents=True)
    table = {
        "run": {"name": "r", "dir": str(tmp_path), "total_steps": 20},
        "model": {"path": "m"},
        "prompts": {"train": "a", "eval": "b"},
    }
    run.config.write_text(dump(parse(table)))
    rows = [eval_row(0, 0.31), *(step_row(n) for n in range(1, 8)), eval_row(6, 0.52)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    run.metrics.write_text(text + '{"kind": "step", "st')
    actors = {"actor-0": {"heard_s_ago": 0.4, "leases": 3}}
    status = {"step": 8, "groups": {"taken": 168, "uniform": 0}, "actors": actors}
    run.status.write_text(json.dumps(status))
    (run.checkpoints / "LATEST").write_text("step-000004\n")
    (run.logs / "learner-local_0.log").write_text(
        "=== learner-0, attempt 1\nsome library chatter\n"
        "12:00:00 CRITICAL learner-0: mismatch/mean_diff = 2.1 is above loss.mismatch_stop.\n\n"
    )
    return run


def test_status_of_a_dead_run_tells_steps_buffer_checkpoint_and_cause(dead_run: RunDir) -> None:
    text = status_text(dead_run)
    assert " 7/20" in text
    assert "0: 0.310, 6: 0.520" in text
    assert "taken 168" in text
    assert "uniform" not in text, "zero counts are left out"
    assert "actor actor-0: heard_s_ago 0.4, leases 3" in text
    assert "newest of checkpoints: step-000004" in text
    assert "mismatch/mean_diff = 2.1 is above loss.mismatch_stop." in text
    assert "chatter" not in text


def test_status_knows_whether_a_launcher_lives(dead_run: RunDir) -> None:
    assert "not running (last sign of life" in status_text(dead_run)
    with open(dead_run.lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert ": running (last sign of life" in status_text(dead_run)
    assert "not running" in status_text(dead_run)


def test_status_of_a_run_that_has_done_nothing_yet(dead_run: RunDir) -> None:
    for path in (dead_run.metrics, dead_run.status, *dead_run.logs.iterdir()):
        path.unlink()
    assert "nothing has been started yet" in status_text(dead_run)


def test_status_wants_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run directory"):
        status_text(RunDir(tmp_path))


def test_picture_is_drawn_and_shows_the_data(dead_run: RunDir) -> None:
    path = report.draw(dead_run)
    assert path == dead_run.report / "curves.png"
    image = matplotlib.image.imread(path)
    assert min(image.shape[:2]) > 500
    red, green, blue = (int(report.TRAIN_COLOR[i : i + 2], 16) / 255 for i in (1, 3, 5))
    has_color = np.abs(image[..., :3] - (red, green, blue)).max(axis=-1) < 0.01
    assert has_color.sum() > 500, "no line in the colour of the training curve"


def test_picture_of_a_run_with_one_step(dead_run: RunDir) -> None:
    dead_run.metrics.write_text(json.dumps(step_row(1)) + "\n")
    assert report.draw(dead_run).stat().st_size > 10_000


def test_nothing_to_draw_is_a_sentence(dead_run: RunDir) -> None:
    dead_run.metrics.write_text("")
    with pytest.raises(report.NothingToDraw, match="no finished step and no evaluation"):
        report.draw(dead_run)
