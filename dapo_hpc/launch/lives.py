"""What the jobs of a run write down about themselves, and what they are asked to do: RUN/jobs/.

    jobs/ STOP target.json site.toml lives/<kind>-<job>_<task>-<restart>.json silent.jsonl

Files, because they outlive their writers and are read from login nodes. One life is one start of
one job; a requeued job begins another.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from dapo_hpc.observe import metrics
from dapo_hpc.run_dir import RunDir, write_json, write_text

SEEN_EVERY_S = 15.0
"""A life's file is rewritten this often; silent for much longer, its supervisor is gone."""

Kind = Literal["train", "learner", "buffer", "actors"]
Phase = Literal[
    "running", "draining", "handed_over", "idle", "stopped", "complete", "failed"
]  # fmt: skip
LEARNING: tuple[Kind, ...] = ("train", "learner")
"""Kinds of job that hold the learner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LifeRecord:
    """One start of one job, as its file tells it."""

    kind: Kind
    job_id: str
    array_job_id: str | None
    """None outside arrays; scontrol then knows the job by job_id."""
    task: int
    """Index in the array; 0 outside arrays."""
    restart: int
    """How often Slurm had requeued the job before this start."""
    nodes: tuple[str, ...]
    gpus: int
    """Of the job, over all its nodes."""
    first_actor: int | None
    """Index of its first actor; None for jobs without actors."""
    started_unix_s: float
    seen_unix_s: float
    phase: Phase
    cause: str
    """Why it is in this phase; '' while nothing has happened."""
    step_at_start: int

    @property
    def address(self) -> str:
        """What scontrol calls the job: 'JOB', or 'ARRAYJOB_TASK'."""
        return f"{self.array_job_id}_{self.task}" if self.array_job_id else self.job_id

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.kind}-{self.array_job_id or self.job_id}_{self.task}-{self.restart}"


def lives_dir(run: RunDir) -> Path:
    return run.jobs / "lives"


class Life:
    """This life's file, rewritten while the job lives.

    Concurrency: a thread of its own keeps it fresh, so that a supervisor that waits for Slurm is
    not taken for dead. `turn` may be called from any thread.
    """

    def __init__(
        self, run: RunDir, record: LifeRecord, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._path = lives_dir(run) / f"{record.name}.json"
        self._record = record
        self._clock = clock
        self._lock = threading.Lock()
        self._closed = threading.Event()

    @property
    def record(self) -> LifeRecord:
        return self._record

    def begin(self) -> None:
        """Write the file, and keep it fresh from now on."""
        for directory in (self._path.parent.parent, self._path.parent):
            directory.mkdir(mode=0o700, exist_ok=True)
        self.write()
        threading.Thread(target=self._keep_fresh, name="life", daemon=True).start()

    def turn(self, phase: Phase, cause: str = "") -> None:
        """Enter a phase, and write it down."""
        with self._lock:
            self._record = replace(self._record, phase=phase, cause=cause)
        self.write()

    def write(self) -> None:
        with self._lock:
            self._record = replace(self._record, seen_unix_s=self._clock())
            write_json(self._path, asdict(self._record))

    def close(self) -> None:
        """The file stays as it is."""
        self._closed.set()

    def _keep_fresh(self) -> None:
        while not self._closed.wait(SEEN_EVERY_S):
            try:
                self.write()
            except OSError:  # a full or absent file system ends no job; the next one tries again
                continue


def read_lives(run: RunDir) -> list[LifeRecord]:
    """Every life of every job, in the order they started."""
    records = [_read(path) for path in sorted(lives_dir(run).glob("*.json"))]
    return sorted((r for r in records if r is not None), key=lambda r: r.started_unix_s)


def _read(path: Path) -> LifeRecord | None:
    """None for a file that vanished, or that another version wrote."""
    try:
        table = json.loads(path.read_text())
        return LifeRecord(**{**table, "nodes": tuple(table["nodes"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def starts_without_progress(run: RunDir, kind: Kind) -> int:
    """Starts of this kind of job since the run's newest step was trained, or since the last of
    them gave up for having none: a person who submits again gets all attempts again."""
    newest = metrics.newest_step(run.metrics, "step")
    starts = 0
    for life in read_lives(run):
        if life.kind != kind:
            continue
        starts = starts + 1 if life.step_at_start >= newest else 0
        if life.phase == "failed":
            starts = 0
    return starts


# ------------------------------------------------------------------ what jobs are asked to do


def _stop_file(run: RunDir) -> Path:
    return run.jobs / "STOP"


def request_stop(run: RunDir) -> None:
    """Every job of the run drains and exits 0."""
    run.jobs.mkdir(mode=0o700, exist_ok=True)
    write_text(_stop_file(run), time.strftime("%Y-%m-%d %H:%M:%S %z\n"))


def clear_stop(run: RunDir) -> None:
    _stop_file(run).unlink(missing_ok=True)


def stop_requested(run: RunDir) -> bool:
    return _stop_file(run).exists()


def set_target(run: RunDir, actors: int) -> None:
    """How many actors the run is to have; those with higher indices drain."""
    run.jobs.mkdir(mode=0o700, exist_ok=True)
    write_json(run.jobs / "target.json", {"actors": actors})


def target(run: RunDir) -> int | None:
    """None until somebody has set it: as many as the config says."""
    try:
        return int(json.loads((run.jobs / "target.json").read_text())["actors"])
    except FileNotFoundError:
        return None


# ------------------------------------------------------------------ where a job is


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """This job as Slurm describes it to its batch script."""

    job_id: str
    array_job_id: str | None
    task: int
    restart: int
    nodelist: str
    num_nodes: int
    cpus_on_node: int
    gpus_on_node: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place:
        """Raises ValueError outside a batch job."""
        if "SLURM_JOB_ID" not in environment:
            raise ValueError(
                "dapo job runs inside a Slurm job; SLURM_JOB_ID is not set. Submit a script that "
                "calls it (see slurm/*.sbatch), or use dapo train on this machine."
            )
        return cls(
            job_id=environment["SLURM_JOB_ID"],
            array_job_id=environment.get("SLURM_ARRAY_JOB_ID"),
            task=int(environment.get("SLURM_ARRAY_TASK_ID", "0")),
            restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
            nodelist=environment.get("SLURM_JOB_NODELIST", ""),
            num_nodes=int(environment.get("SLURM_JOB_NUM_NODES", "1")),
            cpus_on_node=int(environment.get("SLURM_CPUS_ON_NODE", "1")),
            gpus_on_node=int(environment.get("SLURM_GPUS_ON_NODE", "0")),
        )

    @property
    def log_id(self) -> str:
        """Job part of the names of log files; the same for all elements of an array."""
        return self.array_job_id or self.job_id

    @property
    def address(self) -> str:
        """What scontrol calls this job."""
        return f"{self.array_job_id}_{self.task}" if self.array_job_id else self.job_id
