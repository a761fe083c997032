"""Jobs that end or hang without a word, on a real Slurm; the roles have no model."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from dapo_hpc.launch import slurm
from dapo_hpc.launch.lives import read_lives
from dapo_hpc.launch.slurm import QueuedJob
from dapo_hpc.launch.submission import from_run, submit_scripts
from dapo_hpc.observe import metrics
from dapo_hpc.run_dir import RunDir
from tests.slurm.clusters import MiniCluster, wait_for
from tests.slurm.fake_run import make_fake_run, write_fake_site


def start(directory: Path, *, actors: int, **tables: object) -> RunDir:
    run = make_fake_run(directory, actors=actors)
    site = write_fake_site(directory / "site.toml", **tables)
    submit_scripts(from_run(run.root, site))
    wait_for(lambda: step(run) > 2, within_s=60, what="the run trains")
    return run


def step(run: RunDir) -> int:
    return metrics.newest_step(run.metrics, "step")


def running(kind: str) -> list[QueuedJob]:
    return [j for j in slurm.queue() if j.name.endswith(f".{kind}") and j.state == "RUNNING"]


def test_a_waiting_job_takes_over_where_jobs_may_not_requeue(
    tmp_path: Path, mini_cluster: MiniCluster
) -> None:
    run = start(tmp_path, actors=1, learner={"successors": 1})
    (first,) = running("learner")
    mini_cluster.run("scancel", "--batch", "--signal=USR2", first.job_id)
    wait_for(
        lambda: [job.job_id for job in running("learner")] not in ([], [first.job_id]),
        within_s=60,
        what=lambda: f"the successor runs:\n{mini_cluster.run('squeue', '-r')}",
    )
    assert mini_cluster.job(first.job_id)["JobState"] == "COMPLETED"
    assert mini_cluster.job(first.job_id)["Restarts"] == "0"
    before = step(run)
    wait_for(lambda: step(run) > before + 2, within_s=60, what="the successor trains")
    first_life, second_life = [life for life in read_lives(run) if life.kind == "learner"]
    assert first_life.phase == "handed_over"
    assert second_life.step_at_start >= 2


@pytest.mark.full
def test_a_job_that_hangs_is_found_and_its_node_avoided(
    tmp_path: Path, root_cluster: MiniCluster
) -> None:
    """Every process of an actor's job is stopped; for Slurm it runs on."""
    run = start(tmp_path, actors=2)
    job = running("actors")[0]
    for pid in processes_of(job.job_id):
        os.kill(pid, signal.SIGSTOP)
    silent = run.jobs / "silent.jsonl"
    wait_for(silent.exists, within_s=330, what="the keeper has found the silent job")
    (row,) = [json.loads(line) for line in silent.read_text().splitlines()]
    assert (row["job"], row["nodes"]) == (job.address, job.nodes)
    wait_for(
        lambda: len(running("actors")) == 2,
        within_s=120,
        what=lambda: f"both actors run again:\n{root_cluster.run('squeue', '-r')}",
    )
    (again,) = [found for found in running("actors") if found.address == job.address]
    assert again.nodes != job.nodes
    assert root_cluster.job(again.job_id)["ExcNodeList"] == job.nodes


def processes_of(job_id: str) -> list[int]:
    """By the variable that Slurm sets; slurmd and slurmstepd have none."""
    mark = f"SLURM_JOB_ID={job_id}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found
