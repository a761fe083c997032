"""The learner over two nodes, each with its own address, host name and /dev/shm. The lines that ask
for hardware are those of a production script; the GPUs are fake, so the work is done on processors.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from dapo_hpc.launch.site import load_site
from tests.fault.whole_run import SMALL
from tests.slurm.clusters import MiniCluster
from tests.slurm.whole_job import JobRun, submitted

PRODUCTION = {
    "gpus_per_node": 8,
    "cpus_per_node": 64,
    "memory_gib": 500,
    "exclusive": True,
    "time_limit": "01:00:00",
}
LINES = ("#SBATCH --gpus-per-node=8\n", "#SBATCH --exclusive\n", "#SBATCH --mem=500G\n")


class ProductionRun(JobRun):
    """Whole nodes with eight GPUs each, of which the learner uses one."""

    @property
    def site(self) -> Path:
        table = load_site(super().site).model_dump(exclude_none=True, mode="json")
        table["learner"] |= {**PRODUCTION, "ranks_per_node": 1}
        table["actors"] |= PRODUCTION
        path = self.directory / "production.toml"
        path.write_text(tomli_w.dumps(table))
        return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "axis", ["tensor_parallel", pytest.param("data_parallel", marks=pytest.mark.full)]
)
def test_a_learner_on_two_nodes(
    axis: str, base: Path, tmp_path: Path, root_cluster: MiniCluster
) -> None:
    job = ProductionRun(base=base, directory=tmp_path)
    changes = {"run__total_steps": 3, "eval__every": 0, "hardware__gpus_per_node": 8}
    job.write_config(SMALL, **changes, **{f"learner__{axis}": 2})
    submitted(job)
    script = (job.run.jobs / "learner.sbatch").read_text()
    assert all(line in script for line in (*LINES, "#SBATCH --nodes=2\n"))
    job.wait_for_step(1)
    (nodes,) = {
        fields["NodeList"]
        for fields in map(root_cluster.job, job.job_ids())
        if fields["JobName"].endswith(".learner")
    }
    assert len(root_cluster.run("scontrol", "show", "hostnames", nodes).split()) == 2
    job.wait_until_complete()
    assert [row["step"] for row in job.steps()] == [1, 2, 3]
    assert all(row["learner/first_ratio_max_diff"] == 0 for row in job.steps())
    assert all(row["mismatch/mean_diff"] < 1e-5 for row in job.steps())
    job.assert_accounts_close()
