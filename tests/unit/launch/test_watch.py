"""`dapo watch` on run directories in every state."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dapo_hpc import config
from dapo_hpc.launch import watch as module
from dapo_hpc.launch.lives import LifeRecord, lives_dir
from dapo_hpc.launch.watch import watch
from dapo_hpc.run_dir import RunDir, write_json


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr(module, "LOOK_S", 0.02)
    found = RunDir(tmp_path / "run")
    found.logs.mkdir(parents=True)
    table = {
        "run": {"name": "run", "total_steps": 7},
        "model": {"path": "m"},
        "prompts": {"train": "t.parquet"},
        "eval": {"every": 0},
    }
    found.config.write_text(config.dump(config.parse(table)))
    return found


def life(run: RunDir, phase: str, *, kind: str = "learner", started: float = 1.0) -> None:
    record: dict[str, Any] = dict.fromkeys(LifeRecord.__dataclass_fields__)
    record |= {"kind": kind, "job_id": "5", "task": 0, "restart": int(started), "nodes": ["n1"]}
    record |= {"gpus": 0, "started_unix_s": started, "seen_unix_s": started, "step_at_start": 0}
    record |= {"phase": phase, "cause": "why it ended"}
    path = lives_dir(run) / f"{kind}-{started}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


def row(step: int) -> str:
    return json.dumps({"kind": "step", "step": step, "lineage": 1, "unix_s": float(step)}) + "\n"


def test_steps_are_shown_as_they_come_and_a_complete_run_ends_it(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    life(run, "running")

    def train() -> None:
        for step in (1, 2):
            time.sleep(1.0)  # rows that are there when the watching begins are not shown
            with open(run.metrics, "a") as file:
                file.write(row(step))
        time.sleep(0.5)
        run.model.mkdir()

    thread = threading.Thread(target=train)
    thread.start()
    assert watch(run.root) == 0
    thread.join()
    said = capsys.readouterr().out
    assert said.index("1/7") < said.index("2/7") < said.index("Complete. model:")


@pytest.mark.parametrize(("phase", "code"), [("failed", 1), ("stopped", 0)])
def test_an_ended_learner_ends_it(
    run: RunDir, capsys: pytest.CaptureFixture[str], phase: str, code: int
) -> None:
    life(run, "handed_over", started=1.0)
    life(run, phase, started=2.0)
    life(run, "running", kind="actors", started=3.0)
    assert watch(run.root) == code
    assert f"learner job 5 {phase}: why it ended" in capsys.readouterr().out


@pytest.mark.parametrize("phase", ["running", "handed_over", "draining", None])
def test_a_learner_that_will_come_back_does_not(
    run: RunDir, capsys: pytest.CaptureFixture[str], phase: str | None
) -> None:
    if phase is not None:
        life(run, "failed", started=1.0)
        life(run, phase, started=2.0)
    (run.logs / "actors-7_0.log").write_text("12:00:00 INFO actor-0: weights loaded\n")
    looks = 0

    class Interrupted(Exception):
        pass

    def sleep(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module.time, "sleep", sleep)
        with pytest.raises(Interrupted):
            watch(run.root)
    assert "Complete" not in capsys.readouterr().out


def test_another_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run directory"):
        watch(tmp_path)
