"""Where a run stands, read from its files alone: it works when every process is dead."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dapo_hpc.observe import metrics
from dapo_hpc.observe.live import TRAIN_COLUMNS, duration_text
from dapo_hpc.observe.log import last_line, message_of
from dapo_hpc.run_dir import RunDir

NUM_ROWS = 5
JOB_SEEN_S = 60.0
"""A Slurm job of the run writes its file in jobs/lives four times as often."""


def status_text(run: RunDir) -> str:
    """Several lines for a person. Raises ValueError when there is no run in the directory."""
    if not run.config.exists():
        raise ValueError(f"{run.root} is not a run directory: it holds no config.toml.")
    sections = (_head(run), _steps(run), _evaluations(run), _buffer(run), _files(run), _logs(run))
    return "\n".join(line for section in sections for line in section)


def _head(run: RunDir) -> Iterator[str]:
    yield f"{run.root}: {_state(run)}"
    env = json.loads(run.env.read_text()) if run.env.exists() else {}
    if env:
        yield f"  started {env['started']} on {env['host']}, commit {env['commit'] or 'unknown'}"


def _state(run: RunDir) -> str:
    if run.model.exists():
        return "complete"
    watched = [run.metrics, run.status, *run.logs.glob("*.log")]
    times = [path.stat().st_mtime for path in watched if path.exists()]
    if not times:
        return "nothing has been started yet"
    word = "running" if is_locked(run.lock) or _has_job(run) else "not running"
    age_s = max(0.0, time.time() - max(times))
    return f"{word} (last sign of life {duration_text(age_s)} ago)"


def is_locked(path: Path) -> bool:
    """Whether a living launcher holds the lock."""
    if not path.exists():
        return False
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _has_job(run: RunDir) -> bool:
    """Whether a Slurm job of the run has shown itself just now."""
    fresh_s = time.time() - JOB_SEEN_S
    lives = (run.jobs / "lives").glob("*.json")
    newest = [path.read_text() for path in lives if path.stat().st_mtime > fresh_s]
    return any(json.loads(text)["phase"] in ("running", "draining") for text in newest)


def _steps(run: RunDir) -> Iterator[str]:
    rows = metrics.read(run.metrics, "step")
    if not rows:
        rows = metrics.read(run.metrics, "sft")
        yield from (_sft_line(row) for row in rows[-1:])
        return
    total_steps = _total_steps(run)
    held_out = {r["step"]: r["eval/accuracy"] for r in metrics.read(run.metrics, "eval")}
    yield "  ".join(column.title.rjust(column.width) for column in TRAIN_COLUMNS[:-1])
    for row in rows[-NUM_ROWS:]:
        shown = {**row, "total_steps": total_steps, "held_out": held_out.get(row["step"])}
        yield "  ".join(column.text(shown).rjust(column.width) for column in TRAIN_COLUMNS[:-1])


def _sft_line(row: dict[str, Any]) -> str:
    return f"  fine-tuning step {row['step']}: loss {row['sft/loss']:.4f} nats a token"


def _total_steps(run: RunDir) -> int:
    import tomllib

    return int(tomllib.loads(run.config.read_text())["run"]["total_steps"])


def _evaluations(run: RunDir) -> Iterator[str]:
    evals = metrics.read(run.metrics, "eval")
    if evals:
        accuracies = ", ".join(f"{row['step']}: {row['eval/accuracy']:.3f}" for row in evals)
        yield f"held-out accuracy by step: {accuracies}"


def _buffer(run: RunDir) -> Iterator[str]:
    if run.disk_full.exists():
        yield (
            f"the disk of {run.buffer} is full, for {_age_text(run.disk_full)}: the buffer "
            "acknowledges nothing. Free space; it goes on by itself."
        )
    if not run.status.exists():
        return
    snapshot: dict[str, Any] = json.loads(run.status.read_text())
    yield f"buffer, {_age_text(run.status)} ago:"
    actors = snapshot.pop("actors", {})
    snapshot.pop("unix_s", None)
    for name, value in snapshot.items():
        if isinstance(value, dict):
            yield f"  {name}: {_counts_text(value)}"
        elif not isinstance(value, list) or value:
            yield f"  {name}: {_short(value)}"
    for name, value in actors.items():
        yield f"  actor {name}: {_counts_text(value)}"


def _counts_text(counts: dict[str, Any]) -> str:
    filled = [f"{name} {_short(value)}" for name, value in counts.items() if value]
    return ", ".join(filled) or "all zero"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _age_text(path: Path) -> str:
    return duration_text(max(0.0, time.time() - path.stat().st_mtime))


def _files(run: RunDir) -> Iterator[str]:
    for title, directory in (("checkpoints", run.checkpoints), ("weights", run.weights)):
        latest = directory / "LATEST"
        if latest.exists():
            yield f"newest of {title}: {latest.read_text().strip()}"
    if run.model.exists():
        yield f"model: {run.model}"
    picture = run.report / "curves.png"
    if picture.exists():
        yield f"picture: {picture}"


def _logs(run: RunDir) -> Iterator[str]:
    logs = sorted(run.logs.glob("*.log"))
    if logs:
        yield f"last line of each log in {run.logs}:"
    for log in logs:
        yield f"  {log.stem}, {_age_text(log)} ago: {message_of(last_line(log))}"
