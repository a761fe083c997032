"""The only place that runs Slurm's commands.

A controller that is away is waited for. What Slurm then says no to is raised with its own words.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 60.0
"""Of one command; Slurm's own MessageTimeout is 10 s, and a command may ask several times."""
PATIENCE_S = 120.0
"""How long a controller may be away before we give up; its restart takes seconds."""
FIRST_RETRY_S = 1.0
MAX_RETRY_S = 15.0

NOT_REACHED = (
    "Unable to contact slurm controller",
    "Slurm controller not responding",
    "Slurm backup controller in standby mode",
    "Connection refused",
    "Resource temporarily unavailable",
    "temporarily unable to accept job",
    "Incompatible state",
    "Protocol authentication error",
    "If munged is up",
)
"""The controller has not taken the request: it can be sent again."""
UNKNOWN_END = ("Socket timed out", "Zero Bytes were transmitted", "Transport endpoint")
"""The controller may have done what was asked before the answer was lost."""
GONE = ("Invalid job id", "already completing or completed", "Invalid job array task")
OVERRIDING = ("SBATCH_", "SQUEUE_", "SCANCEL_", "SALLOC_", "SLURM_")
"""Variables that change what the words and the script of a command mean. Those of the job around us
would go on into the jobs that we submit, SLURM_RESTART_COUNT for one."""
KEPT = ("SLURM_CONF",)

FIELDS = ("%A", "%F", "%K", "%T", "%r", "%N", "%D", "%L", "%M", "%j", "%Z", "%k")
"""Of squeue, as in QueuedJob; the comment last, since it may hold the separator."""


class SlurmUnavailable(RuntimeError):
    """The controller does not answer; nothing is known about what it would have said."""


class SlurmRefused(ValueError):
    """Slurm said no; the message ends with its own words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedJob:
    """A job, or one element of an array, that Slurm has not finished with."""

    job_id: str
    """Slurm's own number; a pending element that was never started has that of its array."""
    array_job_id: str | None
    task: int | None
    """Index in the array; None outside arrays."""
    state: str
    """PENDING, RUNNING, COMPLETING, CONFIGURING, SUSPENDED, ..."""
    reason: str
    """Why it waits, in Slurm's word; 'None' while it runs."""
    nodes: str
    """Slurm's node list; empty while it waits."""
    num_nodes: int
    name: str
    directory: str
    """Where it was submitted, its $SLURM_SUBMIT_DIR."""
    comment: str
    time_left_s: int | None
    """Until the time limit; None without one."""
    time_used_s: int
    """Since its present start."""

    @property
    def address(self) -> str:
        """What scontrol and scancel call it: 'JOB', or 'ARRAYJOB_TASK'."""
        return self.job_id if self.task is None else f"{self.array_job_id}_{self.task}"


def run(
    words: Sequence[str],
    *,
    text: str | None = None,
    cwd: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    patience_s: float = PATIENCE_S,
    may_repeat: bool = True,
) -> str:
    """Standard output of one of Slurm's commands.

    Args:
        words: the command line.
        text: its standard input.
        cwd: where it runs.
        timeout_s: of one attempt.
        patience_s: how long attempts are repeated while the controller is away.
        may_repeat: whether doing it twice is the same as doing it once; if not, an attempt whose
            end is unknown is not repeated.

    Raises:
        SlurmUnavailable: no answer within the patience, or an unknown end.
        SlurmRefused: Slurm said no, or there is no such command here.
    """
    deadline_s = time.monotonic() + patience_s
    delay_s = FIRST_RETRY_S
    while True:
        said, is_repeatable = _attempt(words, text, cwd, timeout_s)
        if isinstance(said, str):
            return said
        if not (is_repeatable or may_repeat) or time.monotonic() + delay_s > deadline_s:
            raise said
        time.sleep(delay_s)
        delay_s = min(2 * delay_s, MAX_RETRY_S)


def _attempt(
    words: Sequence[str], text: str | None, cwd: Path | None, timeout_s: float
) -> tuple[str | SlurmUnavailable, bool]:
    """Output, or why there is none with whether the controller certainly did nothing."""
    try:
        done = subprocess.run(
            words,
            input=text,
            cwd=cwd,
            env=_environment(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except FileNotFoundError:
        raise SlurmRefused(
            f"{words[0]} is not installed here, or not in PATH. Run this where Slurm's commands "
            "are, which is a login node as a rule."
        ) from None
    except subprocess.TimeoutExpired:
        return _unavailable(words, f"no answer within {timeout_s:.0f} s"), False
    if done.returncode == 0:
        return done.stdout, True
    said = " ".join((done.stderr or done.stdout).split())
    if any(mark in said for mark in UNKNOWN_END):
        return _unavailable(words, said), False
    if any(mark in said for mark in NOT_REACHED):
        return _unavailable(words, said), True
    raise SlurmRefused(f"{words[0]} was refused (exit {done.returncode}): {said}")


def _unavailable(words: Sequence[str], said: str) -> SlurmUnavailable:
    return SlurmUnavailable(
        f"{words[0]}: the Slurm controller does not answer: {said}\n"
        "  Try again when `sinfo` works. Jobs that run are not harmed by its absence."
    )


def _environment() -> dict[str, str]:
    """What Slurm is asked for stands in the words and the script, not in the caller's shell."""
    given = os.environ.items()
    kept = {k: v for k, v in given if k in KEPT or not k.startswith(OVERRIDING)}
    return {**kept, "LC_ALL": "C"}


# ------------------------------------------------------------------ the commands


def sbatch(script: Path | str, *options: str, cwd: Path) -> str:
    """Submit a script, or the text of one. Returns the job id, of an array its common one.

    `cwd` becomes $SLURM_SUBMIT_DIR.

    Raises:
        SlurmUnavailable: it may have been submitted all the same; look before you repeat.
        SlurmRefused: no such partition, limits, and so on.
    """
    words = ["sbatch", "--parsable", *options]
    if isinstance(script, Path):
        said = run([*words, str(script)], cwd=cwd, may_repeat=False)
    else:
        said = run(words, text=script, cwd=cwd, may_repeat=False)
    return said.strip().splitlines()[-1].partition(";")[0]


def queue(
    *,
    names: Iterable[str] = (),
    jobs: Iterable[str] = (),
    timeout_s: float = TIMEOUT_S,
    patience_s: float = PATIENCE_S,
) -> list[QueuedJob]:
    """This user's waiting and running jobs, each array element by itself. One call of squeue.

    Args:
        names: job names to look for; none: any.
        jobs: job ids to look for; none: any. Those that Slurm has forgotten are left out.
        timeout_s: as of `run`.
        patience_s: as of `run`.
    """
    words = ["squeue", "--me", "--array", "--noheader", "--format=" + "|".join(FIELDS)]
    if names := list(names):
        words.append("--name=" + ",".join(names))
    if jobs := list(jobs):
        words.append("--jobs=" + ",".join(jobs))
    try:
        said = run(words, timeout_s=timeout_s, patience_s=patience_s)
    except SlurmRefused as refused:
        if _is_gone(refused):
            return []
        raise
    return [_queued(line) for line in said.splitlines() if line.strip()]


def _queued(line: str) -> QueuedJob:
    *fields, directory, comment = line.split("|", len(FIELDS) - 1)
    job, array, task, state, reason, nodes, number, left, used, name = fields
    is_element = task.isdigit()
    return QueuedJob(
        job_id=job,
        array_job_id=array if is_element else None,
        task=int(task) if is_element else None,
        state=state,
        reason=reason,
        nodes=nodes,
        num_nodes=int(number),
        name=name,
        directory=directory,
        comment="" if comment == "(null)" else comment,
        time_left_s=_seconds(left),
        time_used_s=_seconds(used) or 0,
    )


def _seconds(text: str) -> int | None:
    """Of squeue's [D-[HH:]]MM:SS; None for UNLIMITED, NOT_SET and INVALID."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return seconds + 60 * (minutes + 60 * (hours + 24 * days))


def requeue(job: str) -> None:
    """Put a running job back into the queue: 'JOB', or 'ARRAYJOB_TASK' for an array element.

    Raises SlurmRefused when the job or the cluster does not allow it (--no-requeue).
    """
    run(["scontrol", "requeue", job])


def stay_away(job: str, nodes: str) -> None:
    """A waiting job does not start on these nodes. Raises SlurmRefused when it has started."""
    run(["scontrol", "update", f"JobId={job}", f"ExcNodeList={nodes}"])


def cancel(jobs: Iterable[str], *, signal: str | None = None, pending_only: bool = False) -> None:
    """End jobs, array elements ('JOB_TASK') or steps ('JOB.STEP'); those that are gone are fine.

    Args:
        jobs: what to end; none: nothing happens.
        signal: send this one instead, to every task of the steps.
        pending_only: leave alone what has started.
    """
    options = [f"--signal={signal}"] if signal else []
    options += ["--state=PENDING"] if pending_only else []
    if not (jobs := list(jobs)):
        return
    try:
        run(["scancel", *options, *jobs])
    except SlurmRefused as refused:
        if not _is_gone(refused):
            raise


def steps(job_id: str) -> list[tuple[str, str]]:
    """(step id, name) of a job's running steps, without the batch step: [('12.0', 'learner')]."""
    try:
        said = run(["squeue", "--steps", "--noheader", "--format=%i|%j", f"--jobs={job_id}"])
    except SlurmRefused as refused:
        if _is_gone(refused):
            return []
        raise
    found = [line.strip().split("|", 1) for line in said.splitlines() if line.strip()]
    return [(step, name) for step, name in found if step.rpartition(".")[2].isdigit()]


def hosts(nodelist: str) -> list[str]:
    """Host names of Slurm's shorthand: 'n[1-3]' is n1, n2, n3."""
    return run(["scontrol", "show", "hostnames", nodelist]).split() if nodelist else []


def _is_gone(refused: SlurmRefused) -> bool:
    return any(mark in str(refused) for mark in GONE)
