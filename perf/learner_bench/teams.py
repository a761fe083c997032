"""Processes that take turns: all are there from the start, one team works at a time."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from kernel_bench import ROOT
from kernel_bench.clock import sentence

from .clock import PHASES, held_mib, peak_mib
from .task import Job

READY_S = 900.0
"""For starting, loading and meeting, on a busy machine."""
TURN_S = 600.0
Answer = tuple[str, Any]
"""("ready", MiB held before the model), ("turn", figures), or ("absent" or "failed", sentence)."""


@dataclass(frozen=True)
class Turn:
    """One step of a team."""

    phases_s: dict[str, float]
    """A phase ends where the last rank ends it, so they add up to the step."""
    phases_cpu_s: dict[str, float]
    """Processor time of all ranks."""
    check: dict[str, float]

    def seconds(self, *phases: str) -> float:
        return sum(self.phases_s[phase] for phase in phases)

    def cpu_seconds(self, *phases: str) -> float:
        return sum(self.phases_cpu_s[phase] for phase in phases)


@dataclass
class Team:
    """The processes of one job."""

    job: Job
    status: str = "starting"
    reason: str = ""
    turns: list[Turn] = field(default_factory=list)
    held_mib: float = 0.0
    """Before there was a model, of the largest rank."""
    peak_mib: float = 0.0
    """Of the largest rank."""
    ranks: list[tuple[Any, Connection]] = field(default_factory=list)

    @property
    def is_ready(self) -> bool:
        return self.status == "ready"

    def start(self, context: Any, folder: Path) -> None:
        """Start every rank; they load while others do."""
        folder.mkdir()
        for rank in range(self.job.world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=work, args=(self.job, rank, folder, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.ranks.append((process, ours))

    def wait(self) -> None:
        """Until every rank is ready, or one is not."""
        answers = self._answers("ready", READY_S)
        if answers:
            self.status, self.held_mib = "ready", max(answers)

    def turn(self, *, is_kept: bool) -> None:
        """One step; a team that fails takes no further turns."""
        for _, connection in self.ranks:
            connection.send("go")
        answers = self._answers("turn", TURN_S)
        if not answers:
            return
        self.peak_mib = max(answer["peak_mib"] for answer in answers)
        if is_kept:
            taken = phases_of([answer["ends_s"] for answer in answers], max)
            worked = phases_of([answer["ends_cpu_s"] for answer in answers], sum)
            self.turns.append(Turn(taken, worked, answers[0]["check"]))

    def stop(self) -> None:
        """End every rank, whatever it is doing."""
        for process, connection in self.ranks:
            connection.close()
            process.join(timeout=5.0 if self.is_ready else 0.1)
            if process.is_alive():
                process.kill()
                process.join()
        self.ranks = []

    def leave_out(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason
        print(f"{self.job.name}: {status}: {reason}", flush=True)
        self.stop()

    def _answers(self, wanted: str, seconds: float) -> list[Any]:
        """What every rank says, in order; nothing if one of them says anything else.

        The first to fail is the one with the reason: the others lose it in the middle of a
        collective.
        """
        waited = {connection: rank for rank, (_, connection) in enumerate(self.ranks)}
        found: dict[int, Any] = {}
        until = time.monotonic() + seconds
        while waited:
            speaking: Any = wait(list(waited), max(until - time.monotonic(), 0.0))
            if not speaking:
                self.leave_out("failed", f"no answer in {seconds:.0f} s")
                return []
            rank = waited.pop(speaking[0])
            kind, found[rank] = _answer(*self.ranks[rank])
            if kind != wanted:
                where = f"rank {rank}: " if self.job.world > 1 else ""
                self.leave_out(kind, f"{where}{found[rank]}")
                return []
        return [found[rank] for rank in sorted(found)]


def phases_of(ends: list[dict[str, float]], over_ranks: Any) -> dict[str, float]:
    """Seconds of each phase from when the ranks ended it: `max` for times, `sum` for work."""
    found, before = {}, 0.0
    for phase in PHASES:
        at = [of_rank[phase] for of_rank in ends if phase in of_rank]
        end = over_ranks(at) if at else before
        found[phase], before = end - before, end
    return found


def _answer(process: Any, connection: Connection) -> Answer:
    try:
        answer: Answer = connection.recv()
        return answer
    except (EOFError, OSError):
        process.join(timeout=5.0)
        return "failed", f"the process died, exit status {process.exitcode}"


def context_of(device: str) -> Any:
    """How processes begin. Without a GPU they are copies of one that has imported everything."""
    folders = [str(ROOT / "perf"), str(ROOT), str(ROOT / "kernels")]
    known = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *([known] if known else [])])
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["learner_bench.plain", "learner_bench.ours"])
    return context


class Match:
    """`with Match(jobs, device) as match`: all teams started; those that can be are ready."""

    def __init__(self, jobs: Mapping[str, Job], left_out: Mapping[str, str], device: str) -> None:
        self.teams = {name: Team(job) for name, job in jobs.items()}
        self._left_out, self._device = left_out, device
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> Match:
        context = context_of(self._device)
        for number, (name, team) in enumerate(self.teams.items()):
            if name in self._left_out:
                team.leave_out("skipped", self._left_out[name])
            else:
                team.start(context, Path(self._folder.name) / str(number))
        for team in self.teams.values():
            if team.status == "starting":
                team.wait()
        return self

    def __exit__(self, *_: object) -> None:
        for team in self.teams.values():
            team.stop()
        self._folder.cleanup()

    def round(self, *, is_kept: bool) -> None:
        """One turn of every team."""
        for team in self.teams.values():
            if team.is_ready:
                team.turn(is_kept=is_kept)


# ------------------------------------------------------------------ in the process


def work(job: Job, rank: int, folder: Path, connection: Connection) -> None:
    """The life of one rank, whose end is said to whoever listens."""
    if job.device == "cpu":
        torch.set_num_threads(job.threads)
    try:
        serve(job, rank, folder, connection)
    except ImportError as error:
        connection.send(("absent", f"there is no module {error.name}"))
    except (EOFError, BrokenPipeError):
        pass  # the end: nobody asks for steps any more
    except Exception as error:  # whatever it is, the others go on and the table says it
        connection.send(("failed", sentence(error)))
    sys.stdout.flush()
    os._exit(0)  # ranks of a group that is cut off would wait for each other


def serve(job: Job, rank: int, folder: Path, connection: Connection) -> None:
    """Build, then a step whenever asked; ends with EOFError."""
    held, member = _member(job, rank, folder)
    connection.send(("ready", held))
    while True:
        connection.recv()
        if job.device == "cuda":
            member.step()  # fills the allocator again, which the turn before has emptied
        laps = member.step()
        figures = {"ends_s": laps.ends_s, "ends_cpu_s": laps.ends_cpu_s, "check": member.check()}
        connection.send(("turn", {**figures, "peak_mib": peak_mib(member.device)}))
        if job.device == "cuda":
            torch.cuda.empty_cache()


def _member(job: Job, rank: int, folder: Path) -> tuple[float, Any]:
    """MiB held after imports, and who does the steps."""
    device = torch.device(job.device)
    if job.kind == "ours":
        from .ours import Learner

        return held_mib(device), Learner(job, rank, folder)
    if job.kind == "matmul":
        from .matmul import Matmul

        return held_mib(device), Matmul(job)
    from .plain import Plain

    return held_mib(device), Plain(job)
