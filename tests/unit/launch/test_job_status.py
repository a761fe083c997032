"""The part of `dapo status` about Slurm jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_slurm import FakeSlurm, install
from submitted_run import NOW, make_run, make_site, write_life

from dapo_hpc import cli
from dapo_hpc.launch import lives
from dapo_hpc.launch.job_status import SILENT_S, job_status
from dapo_hpc.launch.repair import repair
from dapo_hpc.run_dir import RunDir

SITE = make_site()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return install(FakeSlurm(), monkeypatch)


@pytest.fixture
def run(fake: FakeSlurm, tmp_path: Path) -> RunDir:
    """A learner (job 1) and four actors (2_0 to 2_3) in the queue."""
    run = make_run(tmp_path, SITE)
    repair(run, SITE)
    assert len(fake.jobs) == 5
    return run


ACTOR: dict[str, Any] = {
    "kind": "actors", "job_id": "4", "array_job_id": "2", "task": 2, "nodes": ("n7",), "gpus": 4,
    "first_actor": 2,
}  # fmt: skip


def test_jobs_are_told_by_kind_and_state(run: RunDir, fake: FakeSlurm) -> None:
    fake.start_everything()
    fake.named(ending=".actors")[3].state = "PENDING"
    assert job_status(run, now_unix_s=NOW).splitlines() == [
        "Slurm jobs:",
        "  learner 1: RUNNING on n1 for 5 min, 60 min left",
        "  actors 2_[3]: 1 PENDING (Resources)",
        "  actors 2_[0-2]: 3 RUNNING on n1",
    ]
    assert fake.count("squeue") == 2, "one of the submission, one of the status"


def test_gpu_hours_are_those_of_every_life(run: RunDir) -> None:
    write_life(run)
    write_life(run, **ACTOR)
    write_life(run, **ACTOR, restart=1, started_unix_s=NOW - 3600)
    assert "GPU-hours: actors 11.99, learner 31.98" in job_status(run, now_unix_s=NOW)


def test_a_job_that_is_silent_while_slurm_says_running_is_named(
    run: RunDir, fake: FakeSlurm
) -> None:
    fake.start_everything()
    write_life(run)
    write_life(run, **ACTOR, seen_unix_s=NOW - SILENT_S - 60)
    said = job_status(run, now_unix_s=NOW)
    assert "silent for 3 min: actors 2_2 on n7, though Slurm says RUNNING" in said
    assert "learner 1 on" not in said


def test_a_job_that_is_gone_or_has_ended_is_not_silent(run: RunDir, fake: FakeSlurm) -> None:
    fake.start_everything()
    write_life(run, seen_unix_s=NOW - 9999, phase="handed_over")
    fake.named(ending=".actors")[2].state = "PENDING"
    write_life(run, **ACTOR, seen_unix_s=NOW - 9999)
    assert "silent" not in job_status(run, now_unix_s=NOW)


def test_the_cause_of_a_failed_job_is_told(run: RunDir) -> None:
    write_life(run, phase="failed", cause="the disk is on fire")
    assert "failed: learner 1 on n1,n2: the disk is on fire" in job_status(run, now_unix_s=NOW)


def test_without_slurm_the_files_still_tell(run: RunDir, fake: FakeSlurm) -> None:
    write_life(run, **ACTOR, seen_unix_s=NOW - 999)
    fake.away = 10**6
    calls = len(fake.calls)
    said = job_status(run, now_unix_s=NOW)
    assert "Slurm does not say which jobs there are" in said
    assert "GPU-hours" in said
    assert "silent for 17 min: actors 2_2 on n7, and Slurm cannot be asked" in said
    assert len(fake.calls) == calls + 1, "it does not wait for the controller"


def test_what_was_asked_for_is_told(run: RunDir) -> None:
    lives.set_target(run, 9)
    lives.request_stop(run)
    said = job_status(run, now_unix_s=NOW)
    assert said.startswith("told to stop")
    assert "actors asked for by dapo scale: 9" in said


def test_a_run_of_this_machine_alone_says_nothing_and_asks_nobody(
    run: RunDir, fake: FakeSlurm, tmp_path: Path
) -> None:
    run.jobs.rename(tmp_path / "elsewhere")
    calls = len(fake.calls)
    assert job_status(run) == ""
    assert len(fake.calls) == calls


def test_a_run_whose_jobs_write_is_running(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    write_life(run)
    run.metrics.touch()
    cli.main(["status", str(run.root)])
    assert f"{run.root}: running" in capsys.readouterr().out
    write_life(run, phase="stopped")
    cli.main(["status", str(run.root)])
    assert f"{run.root}: not running" in capsys.readouterr().out


def test_dapo_status_ends_with_it(
    run: RunDir, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.start_everything()
    assert cli.main(["status", str(run.root)]) == 0
    assert "Slurm jobs:\n  learner 1: RUNNING" in capsys.readouterr().out
