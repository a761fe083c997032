"""`dapo scale` and `dapo stop`: what a run's jobs are asked to do while they run."""

from __future__ import annotations

from pathlib import Path

from dapo_hpc.config import ConfigProblems
from dapo_hpc.launch import lives, prepare, slurm
from dapo_hpc.launch.jobs import actor_count_problems, num_elements
from dapo_hpc.launch.repair import (
    cancel_waiting,
    queued,
    repair,
    site_file,
)
from dapo_hpc.launch.site import Site, load_site
from dapo_hpc.run_dir import RunDir


def scale(root: Path, actors: int) -> str:
    """Have so many actors from now on. Returns what a person reads.

    More are submitted at once. Of fewer, those that wait are cancelled, and those that run hand
    their unfinished work back and leave within seconds.
    """
    run, _ = prepare.open_run(root, "train")
    site = submitted_site(run)
    problems = actor_count_problems(actors, site, "--actors")
    if problems:
        raise ConfigProblems(root.name, problems)
    if run.model.exists() or lives.stop_requested(run):
        why = "is complete" if run.model.exists() else "was told to stop"
        raise ValueError(
            f"{root} {why}, so no actors are added or removed. To go on with a stopped run: "
            f"dapo submit {root} --site <site file>"
        )
    lives.set_target(run, actors)
    repaired = repair(run, site)
    added = sum(len(sent.elements) for sent in repaired.sent)
    beyond = num_elements(actors, site)
    leaving = [job for job in repaired.kept if job.task is not None and job.task >= beyond]
    return "\n".join(
        [
            f"{root}: {actors} actors from now on.",
            f"  jobs submitted: {added}",
            f"  waiting jobs cancelled: {len(repaired.cancelled)}",
            f"  running jobs that hand their work back and leave: {len(leaving)}",
        ]
    )


def stop(root: Path, *, now: bool) -> str:
    """End the run's jobs. Returns what a person reads.

    Args:
        root: run directory.
        now: cancel the jobs instead of letting them put their work away. Nothing acknowledged is
            lost either way: responses under way are, back to the last heartbeat, and the steps
            since the last checkpoint are trained again.
    """
    run, _ = prepare.open_run(root, "train")
    lives.request_stop(run)
    waiting = cancel_waiting(run)
    running = [job.address for job in queued(run) if job.address not in waiting]
    if now:
        slurm.cancel(running)
    site = site_file(RunDir(root)) if site_file(run).exists() else "<site file>"
    return "\n".join(
        [
            f"{root}: told to stop.",
            f"  waiting jobs cancelled: {len(waiting)}",
            f"  running jobs {'cancelled' if now else 'that put their work away'}: {len(running)}",
            f"to go on: dapo submit {root} --site {site}",
        ]
    )


def submitted_site(run: RunDir) -> Site:
    """The site that the run was submitted to. Raises ValueError when it never was."""
    path = site_file(run)
    if not path.exists():
        raise ValueError(
            f"{run.root} was not submitted by `dapo submit` (it holds no jobs/site.toml), so its "
            "number of actors is fixed. To submit it, once nothing else works on it: "
            f"dapo submit {run.root} --site <site file>"
        )
    return load_site(path)
