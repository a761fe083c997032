"""`dapo scale` while the run goes on; engines are paced like GPUs, whose speed is not the CPU's."""

from __future__ import annotations

import json
import time
from pathlib import Path

from dapo_hpc.launch.job_status import job_status
from dapo_hpc.launch.scaling import scale
from dapo_hpc.launch.submission import from_run, submit_scripts
from dapo_hpc.run_dir import RunDir
from tests.slurm.clusters import MiniCluster, wait_for
from tests.slurm.fake_roles import PLACES, ROUND_S
from tests.slurm.fake_run import make_fake_run, write_fake_site

PACE = {ROUND_S: "0.5", PLACES: "16"}
"""1,024 tokens a second at most: a few milliseconds of work in each round."""
LOOK_S = 12.0


def test_three_actors_sample_three_times_as_much_as_one(
    tmp_path: Path, mini_cluster: MiniCluster
) -> None:
    run = make_fake_run(tmp_path, actors=1)
    site = write_fake_site(tmp_path / "site.toml", variables=PACE)
    submit_scripts(from_run(run.root, site))
    wait_for(lambda: num_actors(run) == 1, within_s=40, what=mini_cluster.run("squeue"))
    alone = tokens_per_s(run)
    scale(run.root, 3)
    wait_for(lambda: num_actors(run) == 3, within_s=40, what=mini_cluster.run("squeue"))
    assert "actors asked for by dapo scale: 3" in job_status(run)
    assert job_status(run).count("RUNNING on") >= 2, "the first array, and that of the new ones"
    ratio = tokens_per_s(run) / alone
    print(f"{ratio:.2f} times the tokens of one actor")
    assert 2 < ratio < 4, "no test of speed: two actors would give 2"
    scale(run.root, 1)
    wait_for(
        lambda: "[1" not in mini_cluster.run("squeue") and num_actors(run) == 1,
        within_s=40,
        what=lambda: job_status(run),
    )


def status(run: RunDir) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads(run.status.read_text())
    return found


def num_actors(run: RunDir) -> int:
    """Those that hold work."""
    if not run.status.exists():
        return 0
    return sum(actor["leases"] > 0 for actor in status(run)["actors"].values())  # type: ignore[index]


def tokens_per_s(run: RunDir) -> float:
    """Sampled, whatever became of them, between two snapshots of the buffer."""
    before = status(run)
    time.sleep(LOOK_S)
    after = status(run)
    tokens = sum(after["tokens"].values()) - sum(before["tokens"].values())
    return tokens / (float(after["unix_s"]) - float(before["unix_s"]))  # type: ignore[arg-type]
