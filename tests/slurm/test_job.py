"""What happens to the jobs of a run: preemption, death, time limit, cancel. All parts are real."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from dapo_hpc.launch import lives, slurm
from dapo_hpc.launch.lives import LifeRecord
from dapo_hpc.launch.slurm import QueuedJob, queue
from tests.fault.whole_run import SMALL
from tests.slurm.clusters import MiniCluster
from tests.slurm.whole_job import JobRun, submitted

pytestmark = pytest.mark.slow

WITHIN_S = 120.0


def a_run(base: Path, directory: Path, **settings: object) -> JobRun:
    """Submitted; a step takes a third of a second, so hundreds give time to do something."""
    run = JobRun(base=base, directory=directory)
    quiet = {"eval__every": 0, "learner__checkpoint_every": 10_000}
    run.write_config(SMALL, **{**quiet, **settings})
    submitted(run)
    return run


def jobs(kind: str) -> list[QueuedJob]:
    return [job for job in queue() if job.name.endswith(f".{kind}")]


def preempt_actors(cluster: MiniCluster, directory: Path) -> None:
    """A job in front of them wants every core that the learner leaves, on every node."""
    (learner,) = jobs("learner")
    node = cluster.run("scontrol", "--oneliner", "show", "node", learner.nodes).split()
    cores = dict(word.partition("=")[::2] for word in node)["CPUTot"]
    free = int(cores) - int(cluster.job(learner.job_id)["NumCPUs"])
    cluster.sbatch(
        "sleep 3", "--partition=learner", "--nodes=4", "--ntasks-per-node=1",
        f"--cpus-per-task={free}", "--mem=100", "--time=5", cwd=directory,
    )  # fmt: skip


def newest(run: JobRun, kind: str) -> LifeRecord:
    return [life for life in lives.read_lives(run.run) if life.kind == kind][-1]


def until(run: JobRun, condition: Callable[[], bool], what: str) -> None:
    run._wait(condition, WITHIN_S, what)


def has_given_way(run: JobRun, kind: str, number: int = 1) -> Callable[[], bool]:
    def is_seen() -> bool:
        seen = [life for life in lives.read_lives(run.run) if life.kind == kind]
        return sum(life.phase == "handed_over" for life in seen) >= number

    return is_seen


def trained_once(run: JobRun, total: int) -> None:
    """Each step once, in order, with the rollouts' own policy."""
    rows = run.steps()
    assert [row["step"] for row in rows] == list(range(1, total + 1))
    assert all(row["learner/first_ratio_max_diff"] == 0 for row in rows)
    run.assert_accounts_close()


def finish(run: JobRun, total: int) -> None:
    run.wait_until_complete()
    trained_once(run, total)
    phases = {life.phase for life in lives.read_lives(run.run)}
    assert not phases & {"failed", "idle", "stopped"}


def test_the_learner_gives_way_and_goes_on_where_it_was(
    base: Path, tmp_path: Path, mini_cluster: MiniCluster
) -> None:
    """As before its time limit: Slurm signals the batch step alone."""
    run = a_run(base, tmp_path, run__total_steps=60)
    run.wait_for_step(3)
    (learner,) = jobs("learner")
    mini_cluster.run("scancel", "--batch", "--signal=USR2", learner.job_id)
    until(run, has_given_way(run, "learner"), "hand-over of the learner")
    finish(run, 60)
    log = (run.run.logs / f"learner-{learner.job_id}_0.log").read_text()
    left = next(line for line in log.split("\n") if "asked to leave" in line)
    step = int(left.rpartition("step ")[2].split()[0])
    assert f"lineage 2 starts after step {step}" in log, "nothing was trained twice"
    assert f"=== learner, job {learner.job_id}, start 2, attempt 1" in log
    assert newest(run, "learner").restart == 1
    assert newest(run, "actors").restart == 0, "the actors' job went on"


@pytest.mark.full
def test_actors_preempted_and_killed_cost_throughput_alone(
    base: Path, tmp_path: Path, mini_cluster: MiniCluster
) -> None:
    total = 80
    run = a_run(base, tmp_path, run__total_steps=total, rollout__num_actors=2)
    run.wait_for_step(2)
    for number in (1, 2):
        preempt_actors(mini_cluster, tmp_path)
        until(run, has_given_way(run, "actors", 2 * number), f"preemption {number}")
        run.wait_for_step(int(run.steps()[-1]["step"]) + 3)
    for _ in range(2):
        step = int(run.steps()[-1]["step"])
        run.wait_for_step(step + 3)
        os.kill(next(p for p in run.pids("actor") if _is_python(p)), signal.SIGKILL)
    run.wait_for_step(int(run.steps()[-1]["step"]) + 2)
    os.kill(next(p for p in run.pids("learner") if _is_python(p)), signal.SIGKILL)
    finish(run, total)
    assert any("attempt 2" in log.read_text() for log in run.run.logs.glob("learner-*_0.log")), (
        "the learner was started again in its job"
    )


def _is_python(pid: int) -> bool:
    """Not the srun before it, nor the supervisor."""
    return Path(f"/proc/{pid}/comm").read_text().strip() not in ("srun", "dapo")


@pytest.mark.full
def test_the_time_limit_is_no_end(base: Path, tmp_path: Path, mini_cluster: MiniCluster) -> None:
    run = a_run(base, tmp_path, run__total_steps=40)
    run.wait_for_step(2)
    learner = jobs("learner")[0]
    # As if submitted so; Slurm's own signal comes handover.before_s before it.
    mini_cluster.run("scontrol", "update", f"JobId={learner.job_id}", "TimeLimit=2")
    until(run, has_given_way(run, "learner"), "hand-over before the time limit")
    assert "SIGUSR2" in newest(run, "learner").cause
    mini_cluster.run("scontrol", "update", f"JobId={learner.job_id}", "TimeLimit=60")
    finish(run, 40)


@pytest.mark.full
def test_without_a_signal_to_the_batch_step_actors_give_way_all_the_same(
    base: Path, tmp_path: Path, make_cluster: Callable[..., MiniCluster]
) -> None:
    """Without preempt_send_user_signal Slurm asks the steps alone, with SIGTERM."""
    cluster = make_cluster("user", "--no-user-signal")
    run = a_run(base, tmp_path, run__total_steps=60)
    run.wait_for_step(2)
    preempt_actors(cluster, tmp_path)
    until(run, has_given_way(run, "actors"), "hand-over of the actors")
    finish(run, 60)


@pytest.mark.usefixtures("mini_cluster")
def test_a_cancelled_run_stays_away_and_goes_on_when_submitted_again(
    base: Path, tmp_path: Path
) -> None:
    run = a_run(base, tmp_path, run__total_steps=8, learner__checkpoint_every=2)
    run.wait_for_step(2)
    slurm.cancel([job.address for job in queue()])
    until(run, lambda: not queue(), "an empty queue")
    assert not run.run.model.exists()
    assert run.pids() == []
    submitted(run)
    finish(run, 8)
