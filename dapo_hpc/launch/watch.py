"""`dapo watch`: what `dapo train` shows, of a run that works elsewhere. It reads files alone, and
nobody needs it: the run goes on whether it is watched or not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from dapo_hpc.config import load
from dapo_hpc.launch.fleet import COMPLETE, FAILED, INTERRUPTED
from dapo_hpc.launch.lives import LEARNING, LifeRecord, read_lives
from dapo_hpc.launch.local import stop_requests
from dapo_hpc.observe.live import ProcessState, make_view
from dapo_hpc.observe.log import last_message
from dapo_hpc.run_dir import RunDir

LOOK_S = 1.0
SHOWN_S = 600.0
"""Logs that nobody has written to for longer belong to jobs that are gone."""
ALIVE_S = 120.0


def watch(root: Path) -> int:
    """Show a run until it ends or Ctrl-C, which ends the watching alone.

    Returns:
        COMPLETE, also for a run that was told to stop; FAILED; or INTERRUPTED.

    Raises:
        ValueError: there is no run in the directory.
    """
    run = RunDir(root)
    if not run.config.exists():
        raise ValueError(f"{root} is not a run directory: it holds no config.toml.")
    view = make_view(run.metrics, kind="step", total_steps=load(run.config).run.total_steps)
    with stop_requests() as request:
        try:
            while not (request.count or _end(run)):
                view.update(list(_states(run)))
                time.sleep(LOOK_S)
        finally:
            view.close()
    end = _end(run)
    print(end[1] if end else f"The run goes on. To look again: dapo watch {root}")
    return end[0] if end else INTERRUPTED


def _end(run: RunDir) -> tuple[int, str] | None:
    """Exit code and last words, once the run has ended."""
    if run.model.exists():
        return COMPLETE, f"Complete. model: {run.model}\n  its curves: dapo report {run.root}"
    learner = _newest_learner(run)
    if learner is None or learner.phase not in ("failed", "stopped"):
        return None
    code = FAILED if learner.phase == "failed" else COMPLETE
    how = f"{learner.kind} job {learner.address} {learner.phase}: {learner.cause}"
    return code, f"{how}\n  to look closer: dapo status {run.root}"


def _newest_learner(run: RunDir) -> LifeRecord | None:
    """The last start of a job with the learner; another may be waiting behind it."""
    starts = [life for life in read_lives(run) if life.kind in LEARNING]
    return starts[-1] if starts else None


def _states(run: RunDir) -> Iterator[ProcessState]:
    for log in sorted(run.logs.glob("*.log")):
        silent_s = time.time() - log.stat().st_mtime
        if silent_s < SHOWN_S:
            yield ProcessState(
                name=log.stem,
                is_running=silent_s < ALIVE_S,
                age_s=silent_s,
                message=last_message(log),
            )
