"""Slurm's commands: a controller that is away, answers that are lost, and what Slurm says."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_slurm import FakeSlurm, install

from dapo_hpc.launch import slurm

SCRIPT = "#!/bin/bash\n#SBATCH --job-name=a.learner\n#SBATCH --comment=dapo:runs/a\n"
ARRAY = "#!/bin/bash\n#SBATCH --job-name=a.actors\n#SBATCH --array=0-2\n"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return install(FakeSlurm(), monkeypatch)


def test_an_array_is_told_element_by_element(fake: FakeSlurm, tmp_path: Path) -> None:
    slurm.sbatch(SCRIPT, cwd=tmp_path)
    array = slurm.sbatch(ARRAY, cwd=tmp_path)
    learner, *elements = slurm.queue()
    assert (learner.address, learner.task, learner.comment) == ("1", None, "dapo:runs/a")
    assert learner.directory == str(tmp_path)
    assert [job.address for job in elements] == [f"{array}_0", f"{array}_1", f"{array}_2"]
    assert [job.job_id for job in elements] == ["2", "3", "4"]
    assert fake.count("squeue") == 1


def test_a_controller_that_comes_back_is_waited_for(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.away = 4
    assert slurm.sbatch(SCRIPT, cwd=tmp_path) == "1"
    fake.away = 4
    assert len(slurm.queue()) == 1


def test_a_controller_that_stays_away_is_given_up(fake: FakeSlurm) -> None:
    fake.away = 10**6
    with pytest.raises(slurm.SlurmUnavailable, match=r"squeue.*Unable to contact(.|\n)*sinfo"):
        slurm.queue()


def test_a_submission_whose_answer_is_lost_is_not_repeated(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.lost_answers = 1
    with pytest.raises(slurm.SlurmUnavailable, match="timed out"):
        slurm.sbatch(SCRIPT, cwd=tmp_path)
    assert fake.count("sbatch") == 1
    assert len(slurm.queue()) == 1


def test_a_refusal_is_told_in_slurms_words(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.refusal = "Batch job submission failed: Invalid partition name specified"
    with pytest.raises(slurm.SlurmRefused, match="sbatch was refused.*Invalid partition name"):
        slurm.sbatch(SCRIPT, cwd=tmp_path)
    assert fake.count("sbatch") == 1


def test_ending_a_job_that_is_gone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "scancel: error: Kill job error on job id 7: Invalid job id specified"
    answer = subprocess.CompletedProcess([], 1, "", said)
    given = SimpleNamespace(run=lambda *_a, **_k: answer)
    monkeypatch.setattr(slurm, "subprocess", given)
    slurm.cancel(["7"])
    slurm.cancel([])
    with pytest.raises(slurm.SlurmRefused):
        slurm.requeue("7")


def test_a_command_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(slurm.SlurmRefused, match=r"squeue is not installed here.*login node"):
        slurm.queue()


def test_the_callers_shell_does_not_change_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the job around him."""
    foreign = {"SBATCH_PARTITION", "SQUEUE_STATES", "SCANCEL_INTERACTIVE", "SLURM_RESTART_COUNT"}
    for name in (*foreign, "SLURM_CONF"):
        monkeypatch.setenv(name, "x")
    said = slurm.run(["env"]).splitlines()
    names = {line.partition("=")[0] for line in said}
    assert "SLURM_CONF" in names
    assert names.isdisjoint(foreign)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0:07", 7), ("59:07", 3547), ("1:00:00", 3600), ("2-03:04:05", 183845), ("UNLIMITED", None)],
)
def test_squeues_times(text: str, seconds: int | None) -> None:
    assert slurm._seconds(text) == seconds
