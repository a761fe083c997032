"""The part of `dapo status` about Slurm jobs: what Slurm says, what the jobs say, and where the two
differ. Without Slurm, what the jobs have written still stands."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from dapo_hpc.launch import slurm
from dapo_hpc.launch.jobs import belongs_to
from dapo_hpc.launch.lives import (
    SEEN_EVERY_S,
    LifeRecord,
    read_lives,
    stop_requested,
    target,
)
from dapo_hpc.launch.repair import array_text
from dapo_hpc.launch.slurm import QueuedJob
from dapo_hpc.observe.live import duration_text
from dapo_hpc.run_dir import RunDir

SILENT_S = 8 * SEEN_EVERY_S
"""A life unseen for so long is silent; attribute caches of shared file systems hold a minute."""
ANSWER_S = 10.0
"""How long `dapo status` waits for Slurm."""
ENDED = ("stopped", "complete", "failed", "idle", "handed_over")


def job_status(run: RunDir, *, now_unix_s: float | None = None) -> str:
    """Several lines for a person; empty for a run that was never given to Slurm."""
    if not run.jobs.exists():
        return ""
    now_unix_s = time.time() if now_unix_s is None else now_unix_s
    lives = read_lives(run)
    try:
        jobs, trouble = _jobs(run, lives), ""
    except (slurm.SlurmUnavailable, slurm.SlurmRefused) as error:
        jobs, trouble = [], str(error).splitlines()[0]
    sections = (
        _asked(run),
        [f"Slurm does not say which jobs there are: {trouble}"] if trouble else _queue(jobs),
        _gpu_hours(lives),
        _silent(lives, jobs, now_unix_s, is_certain=not trouble),
        _endings(lives),
    )
    return "\n".join(line for section in sections for line in section)


def _jobs(run: RunDir, lives: Sequence[LifeRecord]) -> list[QueuedJob]:
    """The run's jobs in the queue: by comment, or because they have written a life."""
    root = run.root.absolute()
    addresses = {life.address for life in lives}
    return [
        job
        for job in slurm.queue(timeout_s=ANSWER_S, patience_s=0.0)
        if job.address in addresses
        or belongs_to(root, job_comment=job.comment, directory=job.directory)
    ]


def _asked(run: RunDir) -> Iterator[str]:
    if stop_requested(run):
        yield "told to stop: every job puts its work away and leaves"
    asked = target(run)
    if asked is not None:
        yield f"actors asked for by dapo scale: {asked}"


def _queue(jobs: Sequence[QueuedJob]) -> Iterator[str]:
    yield "Slurm jobs:" if jobs else "Slurm jobs: none"
    for job in jobs:
        if job.task is None:
            yield f"  {_kind(job.name)} {job.address}: {_state(job)}"
    groups: dict[tuple[str, str, str], list[QueuedJob]] = {}
    for job in jobs:
        if job.task is not None:
            groups.setdefault((job.array_job_id or "", job.state, job.reason), []).append(job)
    for (array, state, reason), elements in sorted(groups.items()):
        indices = array_text(sorted(job.task or 0 for job in elements))
        nodes = ",".join(dict.fromkeys(job.nodes for job in elements if job.nodes))
        where = f" on {nodes}" if nodes else _why(reason)
        yield f"  {_kind(elements[0].name)} {array}_[{indices}]: {len(elements)} {state}{where}"


def _state(job: QueuedJob) -> str:
    if not job.nodes:
        return f"{job.state}{_why(job.reason)}"
    left = "" if job.time_left_s is None else f", {duration_text(job.time_left_s)} left"
    return f"{job.state} on {job.nodes} for {duration_text(job.time_used_s)}{left}"


def _why(reason: str) -> str:
    return "" if reason in ("None", "") else f" ({reason})"


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _gpu_hours(lives: Sequence[LifeRecord]) -> Iterator[str]:
    """Of the lives that were written; nodes that were taken count until they were last seen."""
    hours: dict[str, float] = {}
    for life in lives:
        used_s = max(0.0, life.seen_unix_s - life.started_unix_s)
        hours[life.kind] = hours.get(life.kind, 0.0) + life.gpus * used_s / 3600
    if any(hours.values()):
        each = ", ".join(f"{kind} {value:.2f}" for kind, value in sorted(hours.items()))
        yield f"GPU-hours: {each}"


def _silent(
    lives: Sequence[LifeRecord], jobs: Sequence[QueuedJob], now_unix_s: float, *, is_certain: bool
) -> Iterator[str]:
    """Jobs that Slurm takes for running and that have written nothing for long."""
    newest = {life.address: life for life in lives}
    running = {job.address for job in jobs if job.state == "RUNNING"}
    for address, life in newest.items():
        age_s = now_unix_s - life.seen_unix_s
        if life.phase in ENDED or age_s < SILENT_S or (is_certain and address not in running):
            continue
        yield (
            f"silent for {duration_text(age_s)}: {life.kind} {address} on {','.join(life.nodes)}, "
            f"{'though Slurm says RUNNING' if is_certain else 'and Slurm cannot be asked'}"
        )


def _endings(lives: Sequence[LifeRecord]) -> Iterator[str]:
    """Why the newest life of each job that failed did so."""
    newest = {life.address: life for life in lives}
    for address, life in newest.items():
        if life.phase == "failed":
            yield f"failed: {life.kind} {address} on {','.join(life.nodes)}: {life.cause}"
