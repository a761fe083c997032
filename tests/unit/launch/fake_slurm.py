"""A FakeSlurm for faults that a real one does not have on demand: a controller that is away,
answers that are lost after the deed, refusals, and two callers at once."""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dapo_hpc.launch import slurm

AWAY = "error: Unable to contact slurm controller (connect failure)"
LOST = "error: Batch job submission failed: Socket timed out on send/recv operation"


@dataclass
class FakeJob:
    """A job, or an element of an array."""

    job_id: int
    array: int | None
    task: int | None
    name: str
    comment: str
    directory: str
    dependency: str
    state: str = "PENDING"

    @property
    def address(self) -> str:
        return str(self.job_id) if self.task is None else f"{self.array}_{self.task}"


@dataclass
class FakeSlurm:
    """Understands sbatch, squeue, scancel and scontrol requeue as launch.slurm words them."""

    jobs: list[FakeJob] = field(default_factory=list)
    calls: list[list[str]] = field(default_factory=list)
    away: int = 0
    """So many further calls meet no controller."""
    lost_answers: int = 0
    """So many further submissions are done, and their answer is lost."""
    refusal: str = ""
    """What sbatch says no with."""
    before_sbatch: Callable[[], None] | None = None
    """Called once before the next submission: another caller's turn."""
    _ids: Any = field(default_factory=lambda: itertools.count(1))

    def run(self, words: Sequence[str], **given: Any) -> subprocess.CompletedProcess[str]:
        words = list(words)
        self.calls.append(words)
        if self.away:
            self.away -= 1
            return _answer(1, AWAY)
        return getattr(self, f"_{words[0]}")(words[1:], given)

    def named(self, *, ending: str, state: str | None = None) -> list[FakeJob]:
        return [
            j for j in self.jobs if j.name.endswith(ending) and (state is None or j.state == state)
        ]

    def count(self, command: str) -> int:
        return sum(words[0] == command for words in self.calls)

    def start_everything(self) -> None:
        for job in self.jobs:
            job.state = "RUNNING"

    def _sbatch(self, words: list[str], given: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        if self.before_sbatch:
            turn, self.before_sbatch = self.before_sbatch, None
            turn()
        if self.refusal:
            return _answer(1, f"sbatch: error: {self.refusal}")
        text = given["input"] if given["input"] is not None else Path(words[-1]).read_text()
        options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.MULTILINE))
        options |= dict(word[2:].split("=", 1) for word in words if "=" in word)
        first = next(self._ids)
        tasks = _elements(options["array"]) if "array" in options else [None]
        for number, task in enumerate(tasks):
            self.jobs.append(
                FakeJob(
                    job_id=first if not number else next(self._ids),
                    array=None if task is None else first,
                    task=task,
                    name=options["job-name"],
                    comment=options.get("comment", "(null)"),
                    directory=str(given["cwd"]),
                    dependency=options.get("dependency", ""),
                )
            )
        if self.lost_answers:
            self.lost_answers -= 1
            return _answer(1, LOST)
        return _answer(0, f"{first}\n")

    def _squeue(self, words: list[str], _given: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        names = next((w[7:].split(",") for w in words if w.startswith("--name=")), None)
        lines = [_line(job) for job in self.jobs if names is None or job.name in names]
        return _answer(0, "".join(lines))

    def _scancel(
        self, words: list[str], _given: dict[str, Any]
    ) -> subprocess.CompletedProcess[str]:
        addresses = {word for word in words if not word.startswith("--")}
        pending_only = "--state=PENDING" in words
        self.jobs = [
            job
            for job in self.jobs
            if job.address not in addresses or (pending_only and job.state != "PENDING")
        ]
        return _answer(0, "")

    def _scontrol(
        self, words: list[str], _given: dict[str, Any]
    ) -> subprocess.CompletedProcess[str]:
        for job in self.jobs:
            if job.address == words[1]:
                job.state = "PENDING"
                return _answer(0, "")
        return _answer(1, "Invalid job id specified for job " + words[1])


def _line(job: FakeJob) -> str:
    pending = job.state == "PENDING"
    fields = [
        str(job.job_id), str(job.array or job.job_id), "N/A" if job.task is None else str(job.task),
        job.state, "Resources" if pending else "None", "" if pending else "n1", "1", "1:00:00",
        "0:00" if pending else "5:00", job.name, job.directory, job.comment,
    ]  # fmt: skip
    return "|".join(fields) + "\n"


def _elements(text: str) -> list[int | None]:
    found: list[int | None] = []
    for span in text.split(","):
        first, _, last = span.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def _answer(code: int, text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, "" if code else text, text if code else "")


def install(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """In place of Slurm's commands; waiting takes no time."""
    clock = itertools.count()
    processes = SimpleNamespace(run=fake.run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(slurm, "subprocess", processes)
    instant = SimpleNamespace(sleep=lambda _s: None, monotonic=lambda: float(next(clock)))
    monkeypatch.setattr(slurm, "time", instant)
    return fake
