"""Submitting what a run lacks, and only that: the one rule behind submit, scale and the keeper.

What there is, Slurm says, in one answer. What there should be follows from config, site and target.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from dapo_hpc.config import RunConfig, load
from dapo_hpc.launch import slurm
from dapo_hpc.launch.jobs import (
    JobKind,
    JobSpec,
    Origin,
    belongs_to,
    job_name,
    job_specs,
    num_elements,
)
from dapo_hpc.launch.lives import stop_requested, target
from dapo_hpc.launch.sbatch import file_name, script_text
from dapo_hpc.launch.site import Site
from dapo_hpc.launch.slurm import QueuedJob
from dapo_hpc.run_dir import RunDir, write_json, write_text

LOCK_WAIT_S = 60.0
LOCK_POLL_S = 0.2
LEAVING = "COMPLETING"
"""A state that ends in nothing, or in PENDING again when the job was requeued."""

KINDS: tuple[JobKind, ...] = ("learner", "buffer", "actors")

Send = Callable[[JobSpec, Path, Sequence[str], Sequence[int]], str]
"""(job, directory, further options of sbatch, elements of the array) -> job id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """What would have to be done so that a run has what it should have."""

    learners: int = 0
    buffers: int = 0
    elements: tuple[int, ...] = ()
    """Of the array of actors."""
    surplus: tuple[str, ...] = ()
    """Jobs that should not be there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A job that was submitted."""

    kind: JobKind
    job_id: str
    elements: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """What a repair found and did."""

    kept: tuple[QueuedJob, ...] = ()
    sent: tuple[Sent, ...] = ()
    cancelled: tuple[str, ...] = ()


def repair(
    run: RunDir, site: Site, *, leave_out: Collection[int] = (), send: Send | None = None
) -> Repaired:
    """Submit the jobs that the run lacks and cancel those it has twice. Safe to repeat.

    Nothing happens to a run that is complete or was told to stop.

    Args:
        run: with its config.
        site: of the cluster.
        leave_out: elements of the array that are not to be added now.
        send: submits a job; plain sbatch unless given.

    Raises:
        SlurmUnavailable: the controller is away; repeat later, nothing is submitted twice.
        SlurmRefused: with Slurm's reason.
        ConfigProblems: config and site do not fit together.
    """
    if run.model.exists() or stop_requested(run):
        return Repaired()
    config, origin = load(run.config), read_origin(run)
    specs = {spec.kind: spec for spec in job_specs(config, site, run.root.absolute(), origin)}
    _ensure_site(run, site)
    with _lock(run):
        jobs = queued(run)
        missing = find_missing(run, jobs, site, wanted_actors(run, config), leave_out)
        slurm.cancel(missing.surplus)
        sent = tuple(_send(run, specs, jobs, missing, origin.directory, send or send_script(run)))
    kept = tuple(job for job in jobs if job.address not in missing.surplus)
    return Repaired(kept=kept, sent=sent, cancelled=missing.surplus)


def queued(run: RunDir) -> list[QueuedJob]:
    """The run's jobs that Slurm has not finished with."""
    root = run.root.absolute()
    jobs = slurm.queue(names=[job_name(root, kind) for kind in KINDS])
    return [
        job for job in jobs if belongs_to(root, job_comment=job.comment, directory=job.directory)
    ]


def cancel_waiting(run: RunDir) -> list[str]:
    """Cancel the run's jobs that have not started. Returns them."""
    waiting = [job.address for job in queued(run) if job.state == "PENDING"]
    slurm.cancel(waiting, pending_only=True)
    return waiting


def wanted_actors(run: RunDir, config: RunConfig) -> int:
    """As many as `dapo scale` has asked for, else as the config says."""
    asked = target(run)
    return config.rollout.num_actors if asked is None else asked


# ------------------------------------------------------------------ the rule


def find_missing(
    run: RunDir,
    jobs: Sequence[QueuedJob],
    site: Site,
    actors: int,
    leave_out: Collection[int] = (),
) -> Missing:
    """Compare what there is with what there should be. Looks at nothing else.

    A job that is leaving counts as there, since it may come back: better a minute without than two.
    """
    names = {kind: job_name(run.root, kind) for kind in KINDS}
    ranked = sorted(jobs, key=_seniority)
    by_kind = {kind: [job for job in ranked if job.name == names[kind]] for kind in KINDS}
    learners, buffers = 1 + site.learner.successors, int(site.buffer is not None)
    elements = num_elements(actors, site)
    surplus = [*by_kind["learner"][learners:], *by_kind["buffer"][buffers:]]
    there: set[int] = set()
    for job in by_kind["actors"]:
        # Elements beyond the target that run already drain by themselves.
        waits_in_vain = job.state == "PENDING" and _element(job) >= elements
        if _element(job) in there or waits_in_vain:
            surplus.append(job)
        there.add(_element(job))
    return Missing(
        learners=max(0, learners - len(by_kind["learner"])),
        buffers=max(0, buffers - len(by_kind["buffer"])),
        elements=tuple(sorted(set(range(elements)) - there - set(leave_out))),
        surplus=tuple(job.address for job in surplus if job.state != LEAVING),
    )


def _seniority(job: QueuedJob) -> tuple[int, int]:
    """Of two that do the same, the one that runs stays, then the older one."""
    rank = {LEAVING: 2, "PENDING": 1}.get(job.state, 0)
    return rank, int(job.array_job_id or job.job_id)


def _element(job: QueuedJob) -> int:
    return 0 if job.task is None else job.task


def _send(
    run: RunDir,
    specs: dict[JobKind, JobSpec],
    jobs: Sequence[QueuedJob],
    missing: Missing,
    directory: Path,
    send: Send,
) -> Iterator[Sent]:
    """The buffer first; a job waits for the start of what it could do nothing without."""
    waiting = {k: _waiting(run, jobs, k, missing) for k in ("buffer", "learner")}
    for _ in range(missing.buffers):
        job_id = send(specs["buffer"], directory, (), ())
        waiting["buffer"] = job_id
        yield Sent(kind="buffer", job_id=job_id)
    for _ in range(missing.learners):
        after = f",after:{waiting['buffer']}" if waiting["buffer"] else ""
        options = [f"--dependency=singleton{after}"] if after else []
        job_id = send(specs["learner"], directory, options, ())
        waiting["learner"] = waiting["learner"] or job_id
        yield Sent(kind="learner", job_id=job_id)
    if missing.elements:
        first = waiting["learner"]
        options = [f"--dependency=after:{first}"] if first else []
        job_id = send(specs["actors"], directory, options, missing.elements)
        yield Sent(kind="actors", job_id=job_id, elements=missing.elements)


def _waiting(run: RunDir, jobs: Sequence[QueuedJob], kind: JobKind, missing: Missing) -> str | None:
    """The job of this kind that will start first; None when one has started, or there is none."""
    of_kind = [
        job
        for job in jobs
        if job.name == job_name(run.root, kind) and job.address not in missing.surplus
    ]
    if any(job.state not in ("PENDING", LEAVING) for job in of_kind):
        return None
    return min((job.job_id for job in of_kind if job.state == "PENDING"), key=int, default=None)


def send_script(run: RunDir) -> Send:
    """Submits the job's own script, which is kept in RUN/jobs."""

    def send(
        spec: JobSpec, directory: Path, options: Sequence[str], elements: Sequence[int]
    ) -> str:
        script = run.jobs.absolute() / file_name(spec)
        write_text(script, script_text(spec))
        return slurm.sbatch(script, *options, *array_option(elements), cwd=directory)

    return send


def array_option(elements: Sequence[int]) -> list[str]:
    """--array for these elements; none: not an array."""
    return [f"--array={array_text(elements)}"] if elements else []


def array_text(elements: Sequence[int]) -> str:
    """Sorted elements in Slurm's shorthand: 0-3,7."""
    spans: list[list[int]] = []
    for element in elements:
        if spans and element == spans[-1][1] + 1:
            spans[-1][1] = element
        else:
            spans.append([element, element])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


# ------------------------------------------------------------------ what is kept in RUN/jobs


def site_file(run: RunDir) -> Path:
    """The site that jobs use which are not given another."""
    return run.jobs / "site.toml"


def keep_site(run: RunDir, site: Site) -> None:
    """Write the site file of the run, with every value."""
    run.jobs.mkdir(exist_ok=True)
    run.jobs.chmod(0o700)
    write_text(site_file(run), tomli_w.dumps(site.model_dump(mode="json", exclude_none=True)))


def _ensure_site(run: RunDir, site: Site) -> None:
    """For a run that a person submitted with plain sbatch."""
    if not site_file(run).exists():
        keep_site(run, site)


def keep_origin(run: RunDir, origin: Origin) -> None:
    run.jobs.mkdir(mode=0o700, exist_ok=True)
    record = {"directory": str(origin.directory)}
    record |= {k: str(v) for k in ("config", "site") if (v := getattr(origin, k))}
    write_json(_origin_file(run), record)


def read_origin(run: RunDir) -> Origin:
    """As kept by `dapo submit`; without it, that of plain sbatch: where its script has gone to."""
    try:
        record = json.loads(_origin_file(run).read_text())
    except FileNotFoundError:
        return Origin(directory=Path.cwd())
    return Origin(**{name: Path(path) for name, path in record.items()})


def _origin_file(run: RunDir) -> Path:
    return run.jobs / "origin.json"


@contextmanager
def _lock(run: RunDir) -> Iterator[None]:
    """One repair of a run at a time. Where the file system has no locks across nodes, two may
    submit the same element; the next repair cancels one of them."""
    deadline_s = time.monotonic() + LOCK_WAIT_S
    with open(run.jobs / "repair.lock", "a") as file:
        while not _locked(file.fileno()):
            if time.monotonic() > deadline_s:
                raise ValueError(
                    f"{run.jobs}/repair.lock has been held for {LOCK_WAIT_S:.0f} s by another "
                    "`dapo submit`, `dapo scale` or the learner's keeper. Try again."
                )
            time.sleep(LOCK_POLL_S)
        yield


def _locked(descriptor: int) -> bool:
    """Whether we hold it now, or nobody can."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
