"""`dapo doctor` on a real Slurm: everything fits, or exactly the planted fault is found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.slurm.clusters import ROOT, MiniCluster

MINI = ROOT / "slurm" / "sites" / "mini.toml"
SITE = dict[str, Any]


@pytest.fixture
def site(tmp_path: Path) -> SITE:
    """The site file of the mini cluster, with this Python and its own runs directory."""
    tables = tomllib.loads(MINI.read_text())
    tables["environment"] = {"lines": [f"export PATH={Path(sys.executable).parent}:$PATH"]}
    tables["storage"] = {"runs": str(tmp_path / "runs")}
    return tables


def doctor(site: SITE, directory: Path, *options: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code, and the findings by what was checked."""
    file = directory / "site.toml"
    file.write_text(tomli_w.dumps(site))
    words = [sys.executable, "-m", "dapo_hpc.cli", "doctor", "--site", str(file), "--json"]
    done = subprocess.run(
        [*words, *options], cwd=directory, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout, done.stderr
    findings = json.loads(done.stdout)["findings"]
    return done.returncode, {found["check"]: found for found in findings}


def problems(findings: dict[str, dict[str, str]]) -> list[str]:
    wrong = [found for found in findings.values() if found["level"] == "problem"]
    assert all(found["cure"] for found in wrong)
    return [found["check"] for found in wrong]


def test_the_mini_cluster_and_its_site_file_go_together(
    mini_cluster: MiniCluster, site: SITE, tmp_path: Path
) -> None:
    code, findings = doctor(site, tmp_path)
    assert problems(findings) == []
    assert code == 0
    for kind in ("learner", "actors"):
        assert " ran on mn" in findings[f"{kind} trial"]["text"]
        assert findings[f"{kind} links"]["level"] == "ok"
        assert findings[f"{kind} sqlite"]["level"] == "ok"
    assert "sacct does not work here" in findings["accounting"]["text"]
    assert not (tmp_path / "runs").exists(), "a trial leaves nothing"
    assert mini_cluster.run("squeue", "--noheader", "--states=PD,R").strip() == ""


def test_planted_faults_of_the_site_file_are_found(
    mini_cluster: MiniCluster, site: SITE, tmp_path: Path
) -> None:
    assert mini_cluster.form == "user"
    site["learner"]["partition"] = "gpu"
    site["actors"] |= {"time_limit": "3-00:00:00", "gpus_per_node": 9}
    code, findings = doctor(site, tmp_path, "--no-job")
    assert code == 1
    assert problems(findings) == ["learner partition", "actors time limit", "actors nodes"]
    assert "one of: learner, rollout" in findings["learner partition"]["cure"]
    assert "allows (2-00:00:00)" in findings["actors time limit"]["text"]
    assert "actors.gpus_per_node to 8 or less" in findings["actors nodes"]["cure"]


def test_planted_faults_of_the_nodes_are_found(
    mini_cluster: MiniCluster, site: SITE, tmp_path: Path
) -> None:
    assert mini_cluster.form == "user"
    site["network"] = {"interface": "none0"}
    site["storage"]["node_cache"] = "/proc/cache"
    # The fake GPUs answer nobody.
    site["learner"]["gpus_per_node"] = 8
    code, findings = doctor(site, tmp_path)
    assert code == 1
    both = {f"{kind} {check}" for kind in ("learner", "actors") for check in ("node cache",)}
    both |= {f"{kind} interface on nodes" for kind in ("learner", "actors")}
    assert both | {"learner gpus"} <= set(problems(findings))
    assert "no IPv4 address on mn" in findings["learner interface on nodes"]["text"]


def test_a_trial_without_dapo_on_the_nodes(
    mini_cluster: MiniCluster, site: SITE, tmp_path: Path
) -> None:
    assert mini_cluster.form == "user"
    site["environment"] = {"lines": ["export PATH=/usr/bin:/bin"]}
    code, findings = doctor(site, tmp_path)
    assert code == 1
    assert problems(findings) == ["learner trial", "actors trial"]
    assert "2 of 2 nodes left no report" in findings["learner trial"]["text"]
    assert "dapo" in findings["learner trial"]["text"].partition("Its log ends")[2]


def test_a_full_cluster_and_a_dead_controller(
    mini_cluster: MiniCluster, site: SITE, tmp_path: Path
) -> None:
    job = mini_cluster.sbatch("sleep 600", "--nodes=4", "--exclusive", cwd=tmp_path)
    mini_cluster.wait_for_job(job, "RUNNING")
    code, findings = doctor(site, tmp_path, "--wait", "2")
    assert code == 1
    assert problems(findings) == ["learner trial", "actors trial"]
    assert "was PENDING (" in findings["learner trial"]["text"]
    assert mini_cluster.run("squeue", "--noheader", "--format=%A").split() == [job]
    mini_cluster.act("killctld")
    try:
        code, findings = doctor(site, tmp_path)
        assert (code, problems(findings)) == (1, ["controller"])
    finally:
        mini_cluster.act("startctld")


def test_nodes_with_addresses_of_their_own(
    root_cluster: MiniCluster, site: SITE, tmp_path: Path
) -> None:
    assert root_cluster.form == "root"
    site["network"] = {"interface": "eth0", "port_range": [7000, 7031]}
    code, findings = doctor(site, tmp_path)
    assert (code, problems(findings)) == (0, [])
    assert findings["accounting"]["text"] == "sacct works."
    ports = findings["learner port range"]["text"]
    # The cluster's own daemons may have taken one.
    assert re.match("free ports from 7000 to 7031: 3[12] on", ports)
    assert "at every address over eth0" in findings["learner network"]["text"]


@pytest.fixture
def unshared() -> Iterator[Path]:
    """A directory that nodes of the root form do not see: their /dev/shm is their own."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="dapo-doctor-test-") as path:
        yield Path(path)


@pytest.mark.full
def test_a_runs_directory_that_the_nodes_do_not_see(
    root_cluster: MiniCluster, site: SITE, tmp_path: Path, unshared: Path
) -> None:
    assert root_cluster.form == "root"
    site["storage"] = {"runs": str(unshared / "runs")}
    code, findings = doctor(site, tmp_path)
    assert code == 1
    assert problems(findings) == ["learner trial", "actors trial"]
    assert "left no log: the nodes may not see" in findings["learner trial"]["text"]
    assert not os.listdir(unshared)
