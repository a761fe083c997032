"""Mini clusters for tests: started and stopped by the command that users have."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = os.environ.get("DAPO_REQUIRE_SLURM") == "1"


def absent(reason: str) -> None:
    """Skip, or fail where somebody has said that Slurm must be there."""
    if REQUIRED:
        pytest.fail(f"DAPO_REQUIRE_SLURM=1, but {reason}")
    pytest.skip(reason)


def need_slurm() -> None:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    for name in ("slurmctld", "slurmd", "munged", "sbatch"):
        if shutil.which(name, path=path) is None:
            absent(f"{name} is not installed (make slurm-install)")


def mini(*words: str, name: str, within_s: float = 120) -> subprocess.CompletedProcess[str]:
    """`python3 -m slurm.mini --name NAME WORDS`."""
    return subprocess.run(
        [sys.executable, "-m", "slurm.mini", "--name", name, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
    )


@dataclass(frozen=True, kw_only=True)
class MiniCluster:
    """A running cluster. Nodes mn1, mn2, ...; partitions learner and rollout."""

    name: str
    form: str
    conf: Path

    @classmethod
    def start(cls, name: str, form: str, *switches: str) -> MiniCluster:
        """`switches` as of `slurm.mini up`; removed when this test process is gone."""
        up = mini("up", "--form", form, "--owner", str(os.getpid()), *switches, name=name)
        assert up.returncode == 0, up.stderr
        env = mini("env", name=name).stdout
        return cls(name=name, form=form, conf=Path(env.strip().partition("=")[2]))

    def act(self, *words: str) -> str:
        """crash, revive, cut, mend, killd, startd NODE; killctld; startctld; exec NODE ..."""
        done = mini(*words, name=self.name)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def stop(self) -> None:
        self.act("down")

    def environment(self) -> dict[str, str]:
        """What Slurm's commands need to reach this cluster and no job around the tests."""
        outside = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        return outside | {"SLURM_CONF": str(self.conf)}

    def run(self, *words: str, within_s: float = 60, cwd: Path | None = None) -> str:
        """Standard output of one of Slurm's commands."""
        done = subprocess.run(
            words,
            env=self.environment(),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=within_s,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def sbatch(self, command: str, *options: str, cwd: Path) -> str:
        """Submit one line of shell; the job id. Its output is job-ID.out in `cwd`."""
        words = ("sbatch", "--parsable", "--output=job-%j.out", "--open-mode=append", *options)
        return self.run(*words, "--wrap", command, cwd=cwd).strip()

    def job(self, job: str) -> dict[str, str]:
        """Fields of `scontrol show job`, such as JobState, Reason, NodeList, Restarts."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.partition("=")[::2] for word in shown.split())

    def wait_for_job(self, job: str, *states: str, within_s: float = 60) -> dict[str, str]:
        """Wait until a job is in one of the states; its fields."""
        wait_for(
            lambda: self.job(job)["JobState"] in states,
            within_s=within_s,
            what=lambda: f"job {job} became {states}; it is {self.job(job)}",
        )
        return self.job(job)

    def cancel_everything(self) -> None:
        """No job of an earlier test may hold a node, or run on."""
        self.run("scancel", "--full", "--me")
        deadline = time.monotonic() + 10
        while self.run("squeue", "--noheader"):
            if time.monotonic() > deadline:
                # Tasks that ignore SIGTERM live for KillWait; a test should not wait for them.
                self.run("scancel", "--full", "--me", "--signal=KILL")
            assert time.monotonic() < deadline + 30, self.run("squeue")
            time.sleep(0.1)
        self._undrain()

    def _undrain(self) -> None:
        for line in self.run("sinfo", "--noheader", "-N", "-o", "%N %T").splitlines():
            node, state = line.split()
            if state.startswith(("drain", "down")):
                self.act("revive", node)


def wait_for(
    condition: Callable[[], bool], *, within_s: float, what: Callable[[], str] | str = ""
) -> None:
    """Poll a condition of the cluster, which tells nobody when it changes."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.1)
