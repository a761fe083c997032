"""Long simulations of the buffer: `python -m tests.chaos.run --seeds 1000 --seed0 1`.

A failing seed prints one line that repeats it. `--groups N` runs one long history instead and
reports memory and disk; `--plant NAME` puts a bug in, and then finding nothing is the failure.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from dapo_hpc.observe.live import duration_text
from tests.chaos.checker import KINDS
from tests.chaos.history import History
from tests.chaos.plants import PLANTS, planted
from tests.chaos.world import Verdict, long_scenario, run_seed

LINE_S = 10.0
"""Seconds from one progress line to the next."""
NUM_SAMPLES = 20
"""Of memory and disk in a long run."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the simulation takes at one moment: buffer, clients and checker together."""

    groups: int
    rss_mib: float
    disk_mib: float
    ledger_mib: float
    minutes: float


class Totals:
    """Sums over seeds."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.num_seeds = 0
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.failed: list[int] = []
        self.virtual_s = 0.0

    def add(self, verdict: Verdict) -> None:
        self.num_seeds += 1
        self.counts.update(verdict.counts)
        self.faults.update(verdict.faults)
        self.virtual_s += verdict.virtual_s
        self.problems.update(problem.partition(":")[0] for problem in verdict.problems)
        if verdict.problems:
            self.failed.append(verdict.seed)

    def summary(self) -> dict[str, object]:
        """In JSON types; every kind of problem is listed, so that a zero can be read."""
        problems = {kind: 0 for kind in KINDS} | dict(self.problems)
        return {
            "seeds": self.num_seeds,
            "failed_seeds": self.failed,
            "problems": problems,
            "faults": dict(sorted(self.faults.items())),
            "counts": dict(sorted(self.counts.items())),
            "virtual_hours": round(self.virtual_s / 3600, 1),
            "minutes": round((time.monotonic() - self.began) / 60, 1),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.run")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--seed0", type=int, default=1)
    parser.add_argument("--groups", type=int, help="one long run of this many trained groups")
    parser.add_argument("--plant", choices=sorted(PLANTS), help="a bug that must be found")
    parser.add_argument("--out", type=Path, help="write the summary here, as JSON")
    args = parser.parse_args(arguments)
    with planted(args.plant):
        summary = _long(args) if args.groups else _many(args)
    _print(summary)
    if args.out is not None:
        args.out.write_text(json.dumps(summary, indent=2) + "\n")
    is_found = bool(summary["failed_seeds"])
    return int(is_found == (args.plant is None))


def _many(args: argparse.Namespace) -> dict[str, object]:
    totals = Totals()
    said = totals.began
    for seed in range(args.seed0, args.seed0 + args.seeds):
        verdict = run_seed(seed)
        totals.add(verdict)
        _report(verdict, args)
        if verdict.problems and args.plant is not None:
            break
        if time.monotonic() > said + LINE_S:
            said = time.monotonic()
            left_s = (said - totals.began) / totals.num_seeds * (args.seeds - totals.num_seeds)
            print(
                f"{totals.num_seeds} of {args.seeds} seeds, {len(totals.failed)} failed, "
                f"{duration_text(left_s)} left",
                flush=True,
            )
    return totals.summary()


def _report(verdict: Verdict, args: argparse.Namespace) -> None:
    if verdict.problems:
        plant = f" --plant '{args.plant}'" if args.plant else ""
        groups = f" --groups {args.groups}" if args.groups else ""
        print(
            f"python -m tests.chaos.run --seeds 1 --seed0 {verdict.seed}{groups}{plant}"
            f"  # {len(verdict.problems)} problems; {verdict.problems[0]}",
            flush=True,
        )


def _long(args: argparse.Namespace) -> dict[str, object]:
    totals = Totals()
    samples: list[Sample] = []

    def look(history: History, directory: Path) -> None:
        done = history.counts["groups trained"]
        if done < args.groups * len(samples) / NUM_SAMPLES:
            return
        minutes = (time.monotonic() - totals.began) / 60
        samples.append(_sample(done, directory, minutes))
        left_s = 60 * minutes / max(1, done) * (args.groups - done)
        print(f"{samples[-1]}, {duration_text(left_s)} left", flush=True)

    verdict = run_seed(args.seed0, long_scenario(args.groups), look)
    totals.add(verdict)
    _report(verdict, args)
    return totals.summary() | {"samples": [asdict(sample) for sample in samples]}


def _sample(groups: int, directory: Path, minutes: float) -> Sample:
    sizes: dict[int, int] = {}
    ledger = 0
    for path in directory.rglob("*"):
        status = path.stat()
        sizes[status.st_ino] = status.st_size if path.is_file() else 0
        ledger += status.st_size if path.name.startswith("ledger.sqlite") else 0
    rss = psutil.Process().memory_info().rss
    disk = sum(sizes.values())
    return Sample(
        groups,
        round(rss / 2**20, 1),
        round(disk / 2**20, 2),
        round(ledger / 2**20, 2),
        round(minutes, 1),
    )


def _print(summary: dict[str, object]) -> None:
    for name, value in summary.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, number in value.items():
                print(f"  {key:40} {number:>12,}")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            print("  ".join(f"{key:>10}" for key in value[0]))
            for row in value:
                print("  ".join(f"{number:>10,}" for number in row.values()))
        else:
            print(f"{name}: {value}")


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)  # thousands of faults would say so; the summary counts them
    sys.exit(main())
