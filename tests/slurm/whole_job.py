"""Real runs as Slurm jobs on a mini cluster: what starts them, and how they are looked at."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dapo_hpc import config
from dapo_hpc.launch.slurm import queue, sbatch
from dapo_hpc.launch.submission import dry_run, from_files
from tests.fault.whole_run import DEMO, ROOT, WholeRun, set_options

SITE = ROOT / "slurm" / "sites" / "mini.toml"
VENV = Path(sys.executable).parents[1]
PATIENCE_S = 240.0

Way = Callable[["JobRun"], None]


@dataclass
class JobRun(WholeRun):
    """A run of the demo's files whose processes are Slurm's; the cluster is that of SLURM_CONF."""

    @property
    def site(self) -> Path:
        """That of the mini cluster; jobs are not submitted in the project's directory here."""
        path = self.directory / "mini.toml"
        path.write_text(SITE.read_text().replace("source .venv", f"source {VENV}"))
        return path

    def write_config(self, scale: dict[str, object], **settings: object) -> Path:
        """The config as one file, as sbatch takes it; `settings` as in `run__total_steps=3`."""
        dotted = {key.replace("__", "."): value for key, value in settings.items()}
        overrides = set_options({**self.paths(), **scale, **dotted})[1::2]
        path = self.directory / "run.toml"
        path.write_text(config.dump(config.load(DEMO, overrides)))
        return path

    def wait_for_step(self, step: int, limit_s: float = PATIENCE_S) -> None:
        self._wait(lambda: self.has_step(step), limit_s, f"step {step}")

    def wait_until_complete(self, limit_s: float = PATIENCE_S) -> None:
        """The model is there and every job has ended by itself."""
        self._wait(self.run.model.exists, limit_s, "the end of the run")
        self._wait(lambda: not queue(), 60.0, "an empty queue after it")

    def _wait(self, condition: Callable[[], bool], limit_s: float, what: str) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"no {what} in {limit_s:.0f} s:\n{self.picture()}"
            assert queue() or condition(), f"every job has ended before {what}:\n{self.picture()}"
            time.sleep(0.5)

    def job_ids(self) -> list[str]:
        """Of the jobs that Slurm has not finished with."""
        return [job.job_id for job in queue()]

    def picture(self) -> str:
        """Jobs and the ends of all logs, for a failed assertion."""
        logs = [*self.directory.glob("*.log"), *self.run.logs.glob("*.log")]
        tails = [f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs]
        jobs = subprocess.run(["squeue", "-r"], capture_output=True, text=True).stdout
        return "\n".join([jobs, *tails])


def one_allocation(job: JobRun) -> None:
    """`sbatch slurm/train.sbatch CONFIG`, with the options of this cluster on the command line."""
    options = (
        "--partition=learner",
        "--account=nobody",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--cpus-per-task=4",
        "--gpus-per-node=0",
        "--mem=1G",
        "--time=60",
    )
    script = (ROOT / "slurm" / "train.sbatch").read_text()
    script = script.replace("slurm/sites/example.toml", str(job.site))
    script = script.replace("source .venv", f"source {VENV}")
    for line in ("module load cuda/12.8", "#SBATCH --exclusive"):
        script = script.replace(f"{line}\n", "")
    path = job.directory / "train.sbatch"
    path.write_text(script)
    words = ["sbatch", *options, str(path), str(job.directory / "run.toml")]
    subprocess.run(words, check=True, cwd=job.directory, capture_output=True)


def submitted(job: JobRun) -> None:
    """`dapo submit CONFIG --site SITE`."""
    words = [sys.executable, "-m", "dapo_hpc.cli", "submit", str(job.directory / "run.toml")]
    subprocess.run([*words, "--site", str(job.site)], check=True, cwd=job.directory)


def plain_scripts(job: JobRun) -> None:
    """`sbatch` of the scripts that `dapo submit --dry-run` prints."""
    before = Path.cwd()
    os.chdir(job.directory)
    try:
        texts = dry_run(from_files(Path("run.toml"), job.site, [])).split("==> ")[1:]
    finally:
        os.chdir(before)
    job.run.logs.mkdir(parents=True)
    for text in texts:
        name, _, script = text.partition(" <==\n")
        (job.directory / name).write_text(script)
        sbatch(job.directory / name, cwd=job.directory)


WAYS = [one_allocation, submitted, plain_scripts]
