"""Three ways in, the same run directory out: real vLLM, real Megatron-Core, a real Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.whole_run import DEMO_SCALE, SMALL, assert_learned
from tests.slurm.whole_job import WAYS, JobRun, Way

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("mini_cluster")]

WAY = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


@WAY
def test_three_training_steps(way: Way, base: Path, tmp_path: Path) -> None:
    job = JobRun(base=base, directory=tmp_path)
    job.write_config(SMALL, run__total_steps=3, eval__every=0)
    way(job)
    job.wait_until_complete()
    assert [row["step"] for row in job.steps()] == [1, 2, 3]
    assert all(row["learner/first_ratio_max_diff"] == 0 for row in job.steps())
    job.assert_accounts_close()


@pytest.mark.full
@WAY
def test_the_accuracy_of_the_demo(way: Way, demo_base: Path, tmp_path: Path) -> None:
    job = JobRun(base=demo_base, directory=tmp_path)
    job.write_config(DEMO_SCALE)
    way(job)
    job.wait_until_complete(600)
    assert_learned(job)
