"""`dapo scale` and `dapo stop`."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_slurm import FakeSlurm, install
from submitted_run import make_run, make_site

from dapo_hpc.config import ConfigProblems
from dapo_hpc.launch import lives, scaling
from dapo_hpc.launch.repair import repair
from dapo_hpc.run_dir import RunDir

SITE = make_site(per_job=2)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return install(FakeSlurm(), monkeypatch)


@pytest.fixture
def run(fake: FakeSlurm, tmp_path: Path) -> RunDir:
    """Four actors in two jobs, all running."""
    run = make_run(tmp_path, SITE)
    repair(run, SITE)
    fake.start_everything()
    return run


def test_more_actors_are_submitted_under_new_numbers(fake: FakeSlurm, run: RunDir) -> None:
    said = scaling.scale(run.root, 8)
    assert "jobs submitted: 2" in said
    assert sorted(job.task or 0 for job in fake.named(ending=".actors")) == [0, 1, 2, 3]
    assert lives.target(run) == 8


def test_of_fewer_those_that_wait_are_cancelled_and_those_that_run_are_left_to_drain(
    fake: FakeSlurm, run: RunDir
) -> None:
    scaling.scale(run.root, 8)
    said = scaling.scale(run.root, 2)
    assert "waiting jobs cancelled: 2" in said
    assert "leave: 1" in said
    assert sorted(job.task or 0 for job in fake.named(ending=".actors")) == [0, 1]


def test_none_is_a_number_of_actors(fake: FakeSlurm, run: RunDir) -> None:
    assert "leave: 2" in scaling.scale(run.root, 0)
    assert len(fake.named(ending=".learner")) == 1


def test_a_part_of_a_job_is_refused(run: RunDir) -> None:
    with pytest.raises(ConfigProblems, match="--actors = 5 is not a multiple.*Set it to 4 or 6"):
        scaling.scale(run.root, 5)
    with pytest.raises(ConfigProblems, match="expected 0 or more"):
        scaling.scale(run.root, -2)
    assert lives.target(run) is None


def test_stop_asks_what_runs_and_cancels_what_waits(fake: FakeSlurm, run: RunDir) -> None:
    scaling.scale(run.root, 8)
    said = scaling.stop(run.root, now=False)
    assert lives.stop_requested(run)
    assert "waiting jobs cancelled: 2" in said
    assert "put their work away: 3" in said
    assert len(fake.jobs) == 3
    with pytest.raises(ValueError, match="was told to stop"):
        scaling.scale(run.root, 8)


def test_stop_now_cancels_everything(fake: FakeSlurm, run: RunDir) -> None:
    scaling.stop(run.root, now=True)
    assert fake.jobs == []


def test_stop_works_while_the_controller_is_away_for_a_moment(fake: FakeSlurm, run: RunDir) -> None:
    fake.away = 3
    scaling.stop(run.root, now=False)
    assert lives.stop_requested(run)


def test_a_run_that_was_never_submitted_is_told_how(tmp_path: Path, fake: FakeSlurm) -> None:
    run = make_run(tmp_path, SITE)
    (run.jobs / "site.toml").unlink()
    with pytest.raises(ValueError, match=r"was not submitted by.*dapo submit"):
        scaling.scale(run.root, 2)
    assert fake.calls == []
