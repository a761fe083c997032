"""`dapo submit`, `scale` and `stop`, and submitit's objects, on a real Slurm without accounting.

Supervisors, steps and buffer are the real ones; actors and learner have no model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import submitit

from dapo_hpc import cli
from dapo_hpc.config import dump
from dapo_hpc.launch import lives, slurm, submit
from dapo_hpc.launch.executor import RunSlurmJob
from dapo_hpc.launch.repair import queued
from dapo_hpc.observe.metrics import newest_step
from dapo_hpc.run_dir import RunDir
from tests.buffer_process import make_run, small_config
from tests.fault.whole_run import ROOT, SMALL
from tests.slurm.clusters import MiniCluster, wait_for
from tests.slurm.fake_roles import FINISH
from tests.slurm.fake_run import PART_OF_A_NODE, write_fake_site
from tests.slurm.whole_job import JobRun


@pytest.fixture
def here(mini_cluster: MiniCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with run.toml and site.toml, entered; the run's prompts are prepared already."""
    assert mini_cluster.conf.exists()
    for name in ("model", "train.parquet", "eval.parquet"):
        (tmp_path / name).touch()
    config = small_config(rollout__num_actors=2, run__total_steps=10**7)
    (tmp_path / "run.toml").write_text(dump(config))
    run = make_run(tmp_path / "runs", num_prompts=2000)
    run.config.unlink()
    write_fake_site(tmp_path / "site.toml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here: Path) -> RunDir:
    """The run that will be submitted."""
    return RunDir(here / "runs" / "run")


def dapo(*words: str) -> None:
    assert cli.main(list(words)) == 0


def running(run: RunDir) -> list[str]:
    """'learner', and the elements of the array, that run."""
    jobs = [job for job in queued(run) if job.state == "RUNNING"]
    return sorted("learner" if job.task is None else str(job.task) for job in jobs)


def wait_until_running(run: RunDir, *expected: str) -> None:
    wait_for(
        lambda: running(run) == sorted(expected),
        within_s=60,
        what=lambda: f"expected {expected}, got {[(j.address, j.state) for j in queued(run)]}",
    )


def wait_for_buffer(run: RunDir, actors: int) -> None:
    """Until the buffer's snapshot tells of so many living actors."""

    def heard() -> int:
        jobs = {life.job_id for life in lives.read_lives(run) if life.phase == "running"}
        return len([name for name in _actors(run) if any(f"-{job}-" in name for job in jobs)])

    wait_for(lambda: heard() >= actors, within_s=60, what=lambda: str(_actors(run)))


def _actors(run: RunDir) -> list[str]:
    try:
        return list(json.loads(run.status.read_text())["actors"])
    except FileNotFoundError:
        return []


def test_a_run_is_submitted_repaired_scaled_and_stopped(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    dapo("submit", "run.toml", "--site", "site.toml")
    wait_until_running(run, "learner", "0", "1")
    first = {job.address for job in queued(run)}
    capsys.readouterr()
    dapo("submit", "run.toml", "--site", "site.toml")
    assert "Nothing was missing." in capsys.readouterr().out
    assert {job.address for job in queued(run)} == first

    wait_for_buffer(run, 2)
    lost = next(job.address for job in queued(run) if job.task == 1)
    slurm.cancel([lost])
    wait_for(lambda: lost not in {job.address for job in queued(run)}, within_s=60)
    dapo("submit", "runs/run", "--site", "site.toml")
    wait_until_running(run, "learner", "0", "1")

    dapo("scale", "runs/run", "--actors", "4")
    wait_until_running(run, "learner", "0", "1", "2", "3")
    wait_for_buffer(run, 4)
    capsys.readouterr()
    dapo("status", "runs/run")
    said = capsys.readouterr().out
    assert "actors asked for by dapo scale: 4" in said
    assert "learner" in said
    assert "RUNNING on" in said
    dapo("scale", "runs/run", "--actors", "1")
    wait_until_running(run, "learner", "0")

    dapo("stop", "runs/run")
    wait_for(lambda: queued(run) == [], within_s=60)
    ends = {life.address: life.phase for life in lives.read_lives(run) if life.address != lost}
    assert len(ends) == 5
    assert set(ends.values()) == {"stopped"}


def test_submitit_objects_tell_end_and_cancel_jobs_without_accounting(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunSlurmJob, "_results_timeout_s", 1)
    submitted = submit("run.toml", "site.toml")
    (learner,), (first, second) = submitted.learner, submitted.actors
    assert isinstance(learner, submitit.Job)
    assert (submitted.run.root, submitted.buffer) == (run.root, None)
    wait_until_running(run, "learner", "0", "1")
    RunSlurmJob.watcher.update()
    assert {job.state for job in (learner, first, second)} == {"RUNNING"}
    assert not learner.done()

    again = submit("run.toml", "site.toml")
    assert [job.job_id for job in again.actors] == [first.job_id, second.job_id]
    second.cancel()
    wait_for_buffer(run, 1)
    slurm.requeue(first.job_id)
    wait_for(lambda: running(run) == ["learner"], within_s=60)
    wait_until_running(run, "learner", "0")
    assert not first.done()
    (run.root / FINISH).touch()
    assert learner.result() == 0
    assert first.result() == 0
    with pytest.raises(submitit.core.utils.UncompletedJobError):
        second.result()
    assert run.model.exists()
    assert os.stat(run.jobs).st_mode & 0o77 == 0, "pickles lie where nobody else can enter"


@pytest.mark.slow
@pytest.mark.usefixtures("mini_cluster")
def test_three_training_steps_through_submitit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real vLLM and Megatron-Core."""
    job = JobRun(base=base, directory=tmp_path)
    config = job.write_config(SMALL, run__total_steps=3, eval__every=0)
    monkeypatch.chdir(ROOT)
    submitted = submit(config, job.site)
    job.wait_until_complete()
    assert [row["step"] for row in job.steps()] == [1, 2, 3]
    assert [task.result() for task in (*submitted.learner, *submitted.actors)] == [0, 0]
    job.assert_accounts_close()


@pytest.mark.slow
def test_a_buffer_job_engines_by_twos_and_a_successor(run: RunDir, here: Path) -> None:
    """The learner's job is asked to leave as at its time limit; the one that waited goes on."""
    table = {"partition": "learner", **PART_OF_A_NODE}
    write_fake_site(
        here / "site.toml", learner={"successors": 1}, actors={"actors_per_job": 2}, buffer=table
    )
    dapo("submit", "run.toml", "--site", "site.toml")
    wait_for_buffer(run, 2)
    learners = [job for job in queued(run) if job.name == "run.learner"]
    waits, runs = sorted(learners, key=lambda job: job.state)
    assert (waits.state, waits.reason, runs.state) == ("PENDING", "Dependency", "RUNNING")
    slurm.run(["scancel", "--batch", "--signal=USR2", runs.address])
    wait_for(lambda: newest_learner(run) == (waits.address, "running"), within_s=60)
    phases = {life.address: life.phase for life in lives.read_lives(run)}
    assert phases[runs.address] == "handed_over"
    steps = newest_step(run.metrics, "step")
    wait_for(lambda: newest_step(run.metrics, "step") > steps + 2, within_s=60)
    dapo("stop", "runs/run")
    wait_for(lambda: queued(run) == [], within_s=60)


def newest_learner(run: RunDir) -> tuple[str, str]:
    """Address and phase of the learner's job that started last."""
    newest = [life for life in lives.read_lives(run) if life.kind == "learner"][-1]
    return newest.address, newest.phase


def test_three_people_who_submit_at_once_submit_one_run(run: RunDir) -> None:
    words = [sys.executable, "-m", "dapo_hpc.cli", "submit", "run.toml", "--site", "site.toml"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    people = [
        subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [person.communicate(timeout=60)[0] for person in people]
    assert [person.returncode for person in people] == [0, 0, 0], said
    assert len(queued(run)) == 3
    assert sum("Nothing was missing" in text for text in said) == 2


def test_slurm_itself_never_runs_two_learners_of_a_run(
    run: RunDir, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plain script, submitted by hand three times."""
    dapo("submit", "run.toml", "--site", "site.toml", "--dry-run")
    text = capsys.readouterr().out.partition("==> actors")[0].partition("\n")[2]
    (here / "learner.sbatch").write_text(text)
    run.logs.mkdir()
    for _ in range(3):
        subprocess.run(["sbatch", "learner.sbatch"], check=True, capture_output=True)
    wait_until_running(run, "learner")
    waiting = [job for job in queued(run) if job.state == "PENDING"]
    assert [job.reason for job in waiting] == ["Dependency", "Dependency"]
    oldest = next(job.address for job in queued(run) if job.state == "RUNNING")
    slurm.cancel([oldest])
    wait_for(lambda: running(run) == ["learner"] and len(queued(run)) == 2, within_s=60)


def test_refusals_and_ids_are_those_of_the_real_commands(
    mini_cluster: MiniCluster, tmp_path: Path
) -> None:
    assert mini_cluster.conf.exists()
    script = "#!/bin/bash\n#SBATCH --output=/dev/null\nsrun --ntasks=1 --mem=0 sleep 60\n"
    with pytest.raises(slurm.SlurmRefused, match="nvalid partition"):
        slurm.sbatch(script, "--partition=none", cwd=tmp_path)
    job = slurm.sbatch(script, "--array=3,5", "--comment=a|b", cwd=tmp_path)
    wait_for(lambda: len(slurm.steps(job)) == 2, within_s=30)
    three, five = sorted(slurm.queue(jobs=[job]), key=lambda queued: queued.task or 0)
    assert (three.address, five.address) == (f"{job}_3", f"{job}_5")
    assert {(q.comment, q.directory, q.num_nodes) for q in (three, five)} == {
        ("a|b", str(tmp_path), 1)
    }
    assert slurm.steps(three.address) == [(f"{job}_3.0", "sleep")]
    slurm.requeue(five.address)
    wait_for(lambda: slurm.queue(jobs=[five.address])[0].state == "PENDING", within_s=30)
    slurm.cancel([three.address, five.address], pending_only=True)
    wait_for(lambda: [q.task for q in slurm.queue(jobs=[job])] == [3], within_s=30)
    slurm.cancel([three.address, "999999"])
    wait_for(lambda: slurm.queue(jobs=[job]) == [], within_s=30)
    assert slurm.queue(jobs=["999999"]) == []
    assert slurm.hosts("mn[1-3],other") == ["mn1", "mn2", "mn3", "other"]
