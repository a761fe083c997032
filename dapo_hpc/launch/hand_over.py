"""How a job gives way: its roles put their work away in order, then it asks to be started again.

Slurm starts a job again after preemption and node failure only. A job that exits within its grace
time has completed; so it asks for its requeue itself, and sleeps until it is killed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from dapo_hpc.launch import slurm
from dapo_hpc.launch.fleet import Stage
from dapo_hpc.launch.lives import Life
from dapo_hpc.launch.placement import BUFFER, LEARNER, PROMPTS, Job

BUFFER_S = 15.0
"""For the buffer to close its files. It is last, since the others hand their work to it."""
ASK_S = 15.0
"""Kept free before the time limit for the requeue itself."""
SHORTEST_S = 5.0
KILLED_WITHIN_S = 600.0
"""A requeued job is killed at once; Slurm gives its processes KillWait, 30 s by default."""

log = logging.getLogger(__name__)

Wish = Literal["give way", "stop", "surplus", "complete", "fail"]


@dataclass(slots=True)
class JobRequest:
    """Why the job's roles are to leave: the first wish counts. Slurm repeats its signals."""

    wish: Wish | None = None
    cause: str = ""

    @property
    def count(self) -> int:
        return int(self.wish is not None)

    def ask(self, wish: Wish, cause: str) -> None:
        if self.wish is None:
            self.wish, self.cause = wish, cause

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """As a signal handler."""
        from signal import Signals

        self.ask("give way", f"{Signals(number).name} from Slurm: time limit, preemption or cancel")


def stages(job: Job) -> list[Stage]:
    """Actors first, while the buffer can take what they hold; then the learner; the buffer last."""
    handover = job.site.handover
    found = []
    left_s = handover.before_s - ASK_S
    if job.actor_indices:
        found.append(Stage(units=job.actor_names, limit_s=handover.drain_s))
        left_s -= handover.drain_s
    if job.has_learner:
        limit_s = max(left_s - BUFFER_S, SHORTEST_S)
        found.append(Stage(units=frozenset({LEARNER, PROMPTS}), limit_s=limit_s))
    if job.has_buffer:
        found.append(Stage(units=frozenset({BUFFER, PROMPTS}), limit_s=BUFFER_S))
    return found


def start_again(
    job: Job,
    life: Life,
    cause: str,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Ask Slurm to start this job again, and sleep until it ends us; the exit code if it does not.

    0 when a successor waits, or when Slurm is ending the job anyway: it decides then.
    """
    if job.has_learner and job.site.learner.successors:
        life.turn("handed_over", f"{cause}; the next of the waiting jobs takes over")
        log.info("%s.", life.record.cause)
        return 0
    address = job.place.address
    try:
        if not is_running(address):
            life.turn("handed_over", f"{cause}; Slurm is ending the job")
            log.info("%s, so it is not requeued from here.", life.record.cause)
            return 0
        life.turn("handed_over", f"{cause}; requeued")
        slurm.requeue(address)
    except (slurm.SlurmRefused, slurm.SlurmUnavailable) as problem:
        life.turn("failed", f"{cause}; not requeued: {problem}")
        log.critical(
            "job %s gave way (%s) and could not be requeued: %s. Submit what is missing: "
            "dapo submit %s --site SITE",
            address, cause, " ".join(str(problem).split()).rstrip("."), job.run.root,
        )  # fmt: skip
        return 1
    log.info("job %s gave way (%s) and is requeued; it waits to be ended.", address, cause)
    deadline_s = clock() + KILLED_WITHIN_S
    while clock() < deadline_s:
        sleep(1.0)
    life.turn("failed", "requeued, but Slurm never ended this start")
    log.critical(
        "job %s was requeued %.0f s ago and still runs; look at scontrol show job %s.",
        address, KILLED_WITHIN_S, address,
    )  # fmt: skip
    return 1


def is_running(address: str) -> bool:
    """False while Slurm is ending the job: a cancelled one must not come back."""
    return any(job.state == "RUNNING" for job in slurm.queue(jobs=[address]))
