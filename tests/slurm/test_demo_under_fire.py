"""The demo as Slurm jobs while nodes die and jobs are preempted learns what it learns in peace."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from dapo_hpc.launch import slurm
from dapo_hpc.launch.site import load_site
from dapo_hpc.launch.slurm import QueuedJob
from tests.fault.whole_run import DEMO_SCALE, assert_learned
from tests.slurm.clusters import MiniCluster, wait_for
from tests.slurm.whole_job import JobRun, submitted

pytestmark = pytest.mark.full

LIMIT_S = 300.0


class SpreadRun(JobRun):
    """Learner, buffer and each actor have a node to themselves."""

    @property
    def site(self) -> Path:
        table = load_site(super().site).model_dump(exclude_none=True, mode="json")
        table["buffer"] = {**table["learner"]}
        for name in ("ranks_per_node", "successors"):
            table["buffer"].pop(name, None)
        for kind in ("learner", "buffer", "actors"):
            table[kind]["exclusive"] = True
        path = self.directory / "spread.toml"
        path.write_text(tomli_w.dumps(table))
        return path


def test_preemption_power_loss_and_requeue(
    demo_base: Path, tmp_path: Path, root_cluster: MiniCluster
) -> None:
    """The actors are preempted twice; the node of one of them loses power; the learner is requeued;
    the buffer's node loses power."""
    job = SpreadRun(base=demo_base, directory=tmp_path)
    job.write_config(DEMO_SCALE, rollout__num_actors=2)
    submitted(job)
    for step in (2, 4):
        job.wait_for_step(step, LIMIT_S)
        preempt_actors(root_cluster, tmp_path)
    job.wait_for_step(6, LIMIT_S)
    lose_power(root_cluster, job_of("actors"))
    job.wait_for_step(8, LIMIT_S)
    learner = job_of("learner")
    slurm.requeue(learner.address)
    job.wait_for_step(10, LIMIT_S)
    assert root_cluster.job(learner.job_id)["Restarts"] == "1"
    lose_power(root_cluster, job_of("buffer"))
    job.wait_until_complete(2 * LIMIT_S)
    assert_learned(job)


def job_of(kind: str) -> QueuedJob:
    """One that runs."""
    return next(
        job for job in slurm.queue() if job.name.endswith(f".{kind}") and job.state == "RUNNING"
    )


def preempt_actors(cluster: MiniCluster, directory: Path) -> None:
    """A job of the better partition takes their two nodes for a few seconds."""
    elements = [job.address for job in slurm.queue() if job.task is not None]
    assert len(elements) == 2
    intruder = cluster.sbatch(
        "sleep 5", "--partition=learner", "--nodes=2", "--exclusive", "--time=5", cwd=directory
    )
    cluster.wait_for_job(intruder, "COMPLETED", within_s=120)
    wait_for(
        lambda: [job.state for job in slurm.queue() if job.address in elements] == ["RUNNING"] * 2,
        within_s=120,
        what=lambda: f"both actors run again:\n{cluster.run('squeue', '-r')}",
    )


def lose_power(cluster: MiniCluster, job: QueuedJob) -> None:
    """Everything on the job's node is gone at once; the node comes back."""
    cluster.act("crash", job.nodes)
    cluster.run("scontrol", "update", f"nodename={job.nodes}", "state=down", "reason=power")
    wait_for(
        lambda: cluster.job(job.job_id)["JobState"] != "RUNNING",
        within_s=60,
        what="Slurm noticed the loss",
    )
    cluster.act("revive", job.nodes)
