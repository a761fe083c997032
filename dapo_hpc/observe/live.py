"""What a person sees while a run lasts: a live table on a terminal, one line per step elsewhere."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

Row = dict[str, Any]

SHOWN_ROWS = 12
HEADER_EVERY = 20
RATE_ROWS = 6
"""Time left is estimated from the last few steps."""
PROCESS_LINE_S = 10.0
"""Without a terminal: what a starting process says is repeated at most this often."""


class ProcessState(NamedTuple):
    name: str
    is_running: bool
    age_s: float
    message: str
    """What it said last."""


class Column(NamedTuple):
    title: str
    width: int
    text: Callable[[Row], str]


def _number(name: str, form: str) -> Callable[[Row], str]:
    return lambda row: format(row[name], form) if row.get(name) is not None else "-"


TRAIN_COLUMNS = (
    Column("step", 7, lambda row: f"{row['step']}/{row['total_steps']}"),
    Column("accuracy", 8, _number("train/accuracy", ".3f")),
    Column("held-out", 8, _number("held_out", ".3f")),
    Column("length", 7, _number("train/response_tokens_mean", ".1f")),
    Column("entropy", 7, _number("learner/entropy", ".3f")),
    Column("kept", 6, _number("buffer/kept_frac", ".0%")),
    Column("tokens/s", 8, _number("actor/tokens_per_s", ".0f")),
    Column("mismatch", 8, _number("mismatch/mean_diff", ".1e")),
    Column("step s", 6, _number("learner/step_s", ".1f")),
    Column("left", 7, lambda row: duration_text(row["left_s"])),
)
"""accuracy: of all responses sampled for the step. held-out: last evaluation. kept: share of groups
that were informative. mismatch: mean |learner - engine| log-prob."""

SFT_COLUMNS = (
    Column("step", 9, lambda row: f"{row['step']}/{row['total_steps']}"),
    Column("loss", 7, _number("sft/loss", ".4f")),
    Column("tokens/s", 8, _number("sft/tokens_per_s", ".0f")),
    Column("left", 7, lambda row: duration_text(row["left_s"])),
)


@dataclass(slots=True)
class Follower:
    """Reads what was appended to a metrics file since the last call; a torn line waits."""

    path: Path
    _offset: int = 0

    def new_rows(self) -> list[Row]:
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines() if line.strip()]


@dataclass(slots=True)
class Progress:
    """Rows to show, with the last evaluation and the time left filled in."""

    kind: str
    """'step' or 'sft'."""
    total_steps: int
    rows: list[Row] = field(default_factory=list)
    held_out: float | None = None

    def add(self, row: Row) -> Row | None:
        """The row to show, or None for one that only changes what later rows show."""
        if row["kind"] == "eval":
            self.held_out = row["eval/accuracy"]
            return None
        if row["kind"] != self.kind:
            return None
        is_amended = any(_is_same_step(old, row) for old in self.rows[-1:])
        self.rows = [old for old in self.rows if old["step"] < row["step"]]
        shown = {**row, "total_steps": self.total_steps, "held_out": self.held_out}
        self.rows.append(shown)
        shown["left_s"] = self.left_s()
        return None if is_amended else shown

    def left_s(self) -> float | None:
        """Steps left times the median time of the last few; None before there are two."""
        recent = self.rows[-RATE_ROWS:]
        left = self.total_steps - self.rows[-1]["step"] if self.rows else 0
        rates = [
            (b["unix_s"] - a["unix_s"]) / max(1, b["step"] - a["step"])
            for a, b in zip(recent, recent[1:], strict=False)
        ]
        return left * statistics.median(rates) if rates else None


def _is_same_step(old: Row, new: Row) -> bool:
    """A step's row is written again, with the time of its checkpoint, when that is done."""
    return (old["step"], old["lineage"]) == (new["step"], new["lineage"])


class View(Protocol):
    """What the launcher tells the person in front of it."""

    def say(self, text: str) -> None:
        """One event, for good."""

    def update(self, processes: Sequence[ProcessState]) -> None:
        """Called a few times a second; shows what is new."""

    def close(self) -> None: ...


class PlainView:
    """One aligned line per step; before the first, what the starting processes say."""

    def __init__(self, follower: Follower, progress: Progress, columns: Sequence[Column]) -> None:
        self._follower, self._progress, self._columns = follower, progress, columns
        self._num_shown = 0
        self._said: dict[str, str] = {}
        self._said_s = time.monotonic()

    def say(self, text: str) -> None:
        print(text, flush=True)

    def update(self, processes: Sequence[ProcessState]) -> None:
        for row in self._follower.new_rows():
            shown = self._progress.add(row)
            if shown is not None:
                self._show(shown)
            elif row["kind"] == "eval":
                self.say(eval_text(row))
        if not self._num_shown:
            self._say_what_starts(processes)

    def close(self) -> None:
        self.update(())

    def _show(self, row: Row) -> None:
        if self._num_shown % HEADER_EVERY == 0:
            self.say("  ".join(column.title.rjust(column.width) for column in self._columns))
        self._num_shown += 1
        self.say("  ".join(column.text(row).rjust(column.width) for column in self._columns))

    def _say_what_starts(self, processes: Sequence[ProcessState]) -> None:
        if time.monotonic() - self._said_s < PROCESS_LINE_S:
            return
        self._said_s = time.monotonic()
        for process in processes:
            if self._said.get(process.name) != process.message:
                self._said[process.name] = process.message
                self.say(f"  {process.name:<10} {process.age_s:4.0f} s  {process.message[:120]}")


class TableView:
    """The same on a terminal: the last steps as a table, and a line for each process."""

    def __init__(self, follower: Follower, progress: Progress, columns: Sequence[Column]) -> None:
        self._follower, self._progress, self._columns = follower, progress, columns
        self._processes: Sequence[ProcessState] = ()
        self._live = Live(console=Console(), auto_refresh=False)
        self._live.start()

    def say(self, text: str) -> None:
        self._live.console.print(Text(text))

    def update(self, processes: Sequence[ProcessState]) -> None:
        self._processes = processes
        for row in self._follower.new_rows():
            self._progress.add(row)
        self._live.update(self._picture(), refresh=True)

    def close(self) -> None:
        self.update(())
        self._live.stop()

    def _picture(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for column in self._columns:
            table.add_column(column.title, justify="right", min_width=column.width)
        for row in self._progress.rows[-SHOWN_ROWS:]:
            table.add_row(*(column.text(row) for column in self._columns))
        lines = [Text(self._line(process), no_wrap=True) for process in self._processes]
        shown = [table] if self._progress.rows else []
        return Group(*shown, *lines)

    def _line(self, process: ProcessState) -> str:
        state = f"{process.age_s:5.0f} s" if process.is_running else "   down"
        return f"{process.name:<12}{state}  {process.message}"[: self._live.console.width - 1]


def make_view(metrics_path: Path, *, kind: str, total_steps: int) -> View:
    """A table when standard output is a terminal, else lines. Rows already there are not shown
    again as new."""
    follower, progress = Follower(metrics_path), Progress(kind, total_steps)
    for row in follower.new_rows():
        progress.add(row)
    columns = SFT_COLUMNS if kind == "sft" else TRAIN_COLUMNS
    view = TableView if sys.stdout.isatty() else PlainView
    return view(follower, progress, columns)


def eval_text(row: Row) -> str:
    tokens = row.get("eval/response_tokens_mean")
    length = f", {tokens:.1f} tokens a response" if tokens is not None else ""
    return f"held-out accuracy after step {row['step']}: {row['eval/accuracy']:.3f}{length}"


def duration_text(seconds: float | None) -> str:
    """'-', '45 s', '12 min', '3 h 05'."""
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f}"
