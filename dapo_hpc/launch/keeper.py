"""Beside the learner: brings lost actors back, and finds jobs that are silent.

A job is silent when Slurm says it runs, its supervisor has not written for long, and the buffer
hears none of its actors: its node has died without Slurm noticing, or hangs.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dapo_hpc.launch import repair, slurm
from dapo_hpc.launch.jobs import num_elements
from dapo_hpc.launch.lives import LifeRecord, read_lives
from dapo_hpc.launch.placement import Job
from dapo_hpc.launch.slurm import QueuedJob
from dapo_hpc.run_dir import RunDir

EVERY_S = 60.0
"""Between two rounds; each asks Slurm once or twice, for all jobs together."""
SILENT_S = 180.0
"""A supervisor writes every 15 s; file systems may show it a minute late."""
FAILED_WAIT_S = 300.0
"""An element that failed is not added again before."""
ACTOR_JOB = re.compile(r"-job(\d+)-")
"""In the names that actors have for the buffer."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Silent:
    """A job that runs in Slurm's eyes alone."""

    job: QueuedJob
    seen_s_ago: float
    """Since its supervisor last wrote, or since its start."""


@dataclass(slots=True)
class Keeper:
    """Rounds in a thread of their own, so that a slow Slurm keeps nobody waiting."""

    job: Job
    hopeless: Callable[[str], None]
    """Called with the reason when no actor is left that could be added again."""
    clock: Callable[[], float] = time.time
    """Unix seconds, as in the files of lives."""
    _stopped: threading.Event = field(default_factory=threading.Event)
    _said: str = ""

    def start(self) -> None:
        threading.Thread(target=self._run, name="keeper", daemon=True).start()

    def stop(self) -> None:
        """No further round; one under way is not waited for."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(EVERY_S):
            try:
                self.round()
            except Exception as problem:  # the keeper is a helper: the learner goes on without it
                self._say(f"keeper: {type(problem).__name__}: {problem}")

    def round(self) -> None:
        """Look once, and repair what is missing. Nothing to do for a run in one allocation."""
        job = self.job
        if job.kind == "train":
            return
        run, site, now = job.run, job.site, self.clock()
        lives = read_lives(run)
        for silent in find_silent(repair.queued(run), lives, living_jobs(run, now), now):
            self._report(silent)
        if not site.jobs_may_submit:
            return
        resting, given_up = left_out(lives, job, now)
        wanted = num_elements(repair.wanted_actors(run, job.config), site)
        if wanted and len([element for element in given_up if element < wanted]) == wanted:
            self.hopeless(_hopeless(lives, job))
            return
        done = repair.repair(run, site, leave_out=resting | given_up)
        for sent in done.sent:
            log.info("keeper: submitted what was missing: %s %s.", sent.kind, sent.job_id)

    def _report(self, silent: Silent) -> None:
        job, run = silent.job, self.job.run
        row = {
            "unix_s": self.clock(),
            "job": job.address,
            "nodes": job.nodes,
            "seen_s_ago": round(silent.seen_s_ago),
        }
        with open(run.jobs / "silent.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        log.warning(
            "keeper: job %s runs on %s by Slurm's account, but has been silent for %.0f s; it is "
            "requeued away from there. Look at the node: %s/silent.jsonl lists all.",
            job.address, job.nodes, silent.seen_s_ago, run.jobs,
        )  # fmt: skip
        slurm.requeue(job.address)
        try:
            slurm.stay_away(job.address, job.nodes)
        except slurm.SlurmRefused as refused:
            log.warning("keeper: node %s cannot be excluded: %s", job.nodes, refused)

    def _say(self, text: str) -> None:
        """Once, until it is something else."""
        if text != self._said:
            self._said = text
            log.warning("%s", text)


# ------------------------------------------------------------------ rules


def living_jobs(run: RunDir, now_unix_s: float) -> set[str] | None:
    """Slurm jobs of which the buffer hears an actor; None when the buffer itself is not heard."""
    try:
        status: dict[str, Any] = json.loads(run.status.read_text())
        age_s = now_unix_s - run.status.stat().st_mtime
    except (OSError, ValueError):
        return None
    if age_s > SILENT_S:
        return None
    heard = {
        name
        for name, view in status.get("actors", {}).items()
        if view["heard_s_ago"] + age_s < SILENT_S
    }
    return {found[1] for name in heard if (found := ACTOR_JOB.search(name))}


def find_silent(
    jobs: Iterable[QueuedJob],
    lives: Sequence[LifeRecord],
    living: Collection[str] | None,
    now_unix_s: float,
) -> list[Silent]:
    """Jobs of actors that run and of which nobody hears anything.

    Args:
        jobs: of the run, as Slurm knows them.
        lives: all of the run.
        living: what `living_jobs` found; None: nothing is known, so nobody is accused.
        now_unix_s: the time.
    """
    if living is None:
        return []
    newest = {life.job_id: life for life in lives if life.kind == "actors"}
    found = []
    for job in jobs:
        if job.state != "RUNNING" or job.task is None or job.job_id in living:
            continue
        life = newest.get(job.job_id)
        silent_s: float = job.time_used_s
        if life is not None:
            silent_s = min(silent_s, now_unix_s - life.seen_unix_s)
        if silent_s > SILENT_S:
            found.append(Silent(job=job, seen_s_ago=silent_s))
    return found


def left_out(
    lives: Sequence[LifeRecord], job: Job, now_unix_s: float
) -> tuple[set[int], set[int]]:  # fmt: skip
    """Elements of the array that rest for a while, and those that failed too often to try again."""
    resting, given_up = set(), set()
    endings: dict[int, list[LifeRecord]] = {}
    for life in lives:
        if life.kind == "actors":
            endings.setdefault(life.task, []).append(life)
    for element, past in endings.items():
        newest = past[-1]
        ago_s = now_unix_s - newest.seen_unix_s
        if newest.phase == "idle" and ago_s < job.site.actors.idle_exit_s:
            resting.add(element)
        if newest.phase == "failed":
            num_failed = _failed_in_a_row(past)
            if num_failed >= job.config.launch.max_job_starts:
                given_up.add(element)
            elif ago_s < FAILED_WAIT_S:
                resting.add(element)
    return resting, given_up


def _failed_in_a_row(past: Sequence[LifeRecord]) -> int:
    """At the same step of the run, newest first."""
    count, step = 0, past[-1].step_at_start
    for life in reversed(past):
        if life.phase != "failed" or life.step_at_start != step:
            break
        count += 1
    return count


def _hopeless(lives: Sequence[LifeRecord], job: Job) -> str:
    last = [life for life in lives if life.kind == "actors"][-1]
    return (
        f"every job of actors failed {job.config.launch.max_job_starts} times without a further "
        f"step (launch.max_job_starts), the last one with: {last.cause}"
    )
