"""The command line of one benchmark: `main` runs its tasks and writes what they found."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import ROOT, machine, peers
from .clock import Budget
from .record import Record, write_text
from .report import markdown, result_name
from .runner import DeviceLost, Runner
from .targets import judge
from .task import Settings, Task

CPU_SHRINK = 128
"""Sizes are divided by this where there is no GPU."""
LOST = 3
"""Exit status after a kernel has gone astray; the record names whose."""


def parser(description: str, minutes: float) -> argparse.ArgumentParser:
    """The options of every benchmark, and of run_all.py."""
    words = argparse.ArgumentParser(description=description.splitlines()[0])
    words.add_argument("--minutes", type=float, default=minutes, help="time for everything")
    words.add_argument("--output", type=Path, metavar="FOLDER", help="results; else perf/results")
    words.add_argument("--device", choices=["cuda", "cpu"], help="default: a GPU if there is one")
    words.add_argument(
        "--shrink", type=int, help=f"divide sizes; default 1, or {CPU_SHRINK} on CPU"
    )
    words.add_argument("--peers", type=folder, metavar="FOLDER", help="from setup_kernel_peers.sh")
    words.add_argument("--commit", metavar="HASH", help="of this tree, where git cannot tell")
    words.add_argument("--only", nargs="+", default=[], help="providers whose names begin so")
    words.add_argument("--without", nargs="+", default=[], help="providers to leave out")
    return words


def folder(word: str) -> Path:
    if not Path(word).is_dir():
        raise argparse.ArgumentTypeError(
            f"there is no folder {word}; bash perf/setup_kernel_peers.sh {word} makes it"
        )
    return Path(word)


def main(name: str, description: str, tasks: Callable[[Settings], list[Task]]) -> int:
    words = parser(description, minutes=4.0)
    words.add_argument("--part", type=Path, help=argparse.SUPPRESS)  # for run_all.py
    args = words.parse_args()
    budget = Budget(args.minutes * 60)
    settings = settings_of(args)
    peers.use_folder(args.peers)
    if settings.device.type == "cpu":
        # Megatron compiles on import of its kernels; here that would only take time.
        torch.compiler.set_stance("force_eager")
    described = machine.describe(settings.device, args.commit)
    header = {"machine": described, "peers": peers.versions()}
    results = results_folder(args.output, settings.device.type)
    place = args.part or (results and results / f"{result_name(described, name)}.json")
    record = Record(name, header, place)
    status = run(record, settings, budget, tasks)
    if not args.part:
        show(record, place)
    return status


def run(
    record: Record, settings: Settings, budget: Budget, tasks: Callable[[Settings], list[Task]]
) -> int:
    try:
        runner = Runner(settings, record, budget)
        for task in tasks(settings):
            runner.run(task)
    except DeviceLost as error:
        print(f"the GPU is lost to this process: {error}", file=sys.stderr)
        return LOST
    except BaseException:
        # The record keeps what it said last; whoever reads it sees where this happened.
        traceback.print_exc()
        return 1
    record.end("done")
    return 0


def settings_of(args: argparse.Namespace) -> Settings:
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    shrink = args.shrink or (1 if kind == "cuda" else CPU_SHRINK)
    return Settings(device=device, shrink=shrink, only=args.only, without=args.without)


def results_folder(output: Path | None, device: str) -> Path | None:
    """Figures of a CPU are no results: they are written only where someone asks for them."""
    if output is not None or device != "cuda":
        return output
    return ROOT / "perf" / "results"


def show(record: Record, place: Path | None) -> None:
    """The table, printed; and beside the JSON."""
    found = record.found
    text = markdown(whole([found]))
    print(text)
    if place is not None:
        write_text(place.with_suffix(".md"), text)
        print(f"written: {place} and {place.with_suffix('.md').name}")


def whole(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Benchmarks of one run as one document, with the targets beside."""
    first = parts[0]
    common = ("machine", "peers")
    rows = [row for part in parts for row in part["rows"]]
    return {
        "question": "how near the hardware's limits the kernels are, beside their peers",
        **{name: first[name] for name in common},
        "benches": [
            {name: value for name, value in part.items() if name not in common} for part in parts
        ],
        "targets": judge(rows),
    }
