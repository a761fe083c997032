"""Every kernel benchmark on one machine within the time given, most important first.

    python perf/run_all.py --minutes 9                     # on a GPU; writes to perf/results/
    python perf/run_all.py --minutes 3 --output FOLDER     # on a CPU, small: does it work at all?

One process for each benchmark, so that a kernel which goes astray takes nothing else with it; it is
then run again without the provider that was at work. Results are on disk as they come. `--peers`
names the folder that perf/setup_kernel_peers.sh made. See perf/PROTOCOL.md.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kernel_bench import ROOT
from kernel_bench.command import parser, results_folder, whole
from kernel_bench.record import write_text
from kernel_bench.report import markdown, result_name

BENCHES = {"logprob": 0.36, "linear_dapo_loss": 0.50, "dapo_loss": 0.14}
"""Share of the time that is left to this one and those after it, relative to each other."""
GRACE_S = 20.0
"""Beyond its time, before a benchmark is stopped."""
RESERVE_S = 10.0
"""For writing the end."""
START_S = 8.0
"""Until a process has imported torch and looks at the clock."""
WORTH_REPEATING_S = 30.0


class Collection:
    """The documents of all benchmarks so far, and the two files made of them."""

    def __init__(self, output: Path | None) -> None:
        self.output = output
        self.place: Path | None = None
        self.parts: dict[str, dict[str, Any]] = {}

    def take(self, name: str, file: Path, before: dict[str, Any] | None) -> None:
        """What the file says now; rows of an earlier attempt stay where it has none yet."""
        try:
            part = json.loads(file.read_text())
        except (OSError, json.JSONDecodeError):
            return
        if before is not None:
            known = {(row["task"], row["provider"]) for row in part["rows"]}
            part["rows"] += [r for r in before["rows"] if (r["task"], r["provider"]) not in known]
        if part != self.parts.get(name):
            self.parts[name] = part
            self.write()

    def write(self) -> None:
        found = self.found()
        if self.place is None:
            folder = results_folder(self.output, found["machine"]["device"])
            if folder is None:
                return
            self.place = free_place(folder / result_name(found["machine"], "kernels"))
        write_text(self.place.with_name(self.place.name + ".json"), json.dumps(found, indent=1))
        write_text(self.place.with_name(self.place.name + ".md"), markdown(found))

    def found(self) -> dict[str, Any]:
        return whole(list(self.parts.values()))


def free_place(place: Path) -> Path:
    """A result is never changed afterwards: another run of the same day gets a number."""
    number, free = 1, place
    while free.with_name(free.name + ".json").exists():
        number += 1
        free = place.with_name(f"{place.name}-{number}")
    return free


def main() -> int:
    started = time.monotonic()
    args = parser(__doc__, minutes=9.0).parse_args()
    # So that the benchmark under way is ended as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    ends = started + args.minutes * 60 - RESERVE_S
    collection = Collection(args.output)
    codes = {}
    for name, seconds in shares(ends):
        print(f"-- {name}, {seconds():.0f} s", flush=True)
        codes[name] = run_bench(name, args, collection, time.monotonic() + seconds())
    if not collection.parts:
        print("no benchmark has found anything", file=sys.stderr)
        return 1
    print(markdown(collection.found()))
    print(f"{time.monotonic() - started:.0f} s")
    if collection.place is not None:
        print(f"written: {collection.place}.json and .md")
    return int(any(codes.values()))


def shares(ends: float) -> Any:
    """Each benchmark with its seconds: what one does not need, the next ones get."""
    names = list(BENCHES)
    for place, name in enumerate(names):
        rest = sum(BENCHES[other] for other in names[place:])
        yield name, lambda part=BENCHES[name] / rest: max((ends - time.monotonic()) * part, 1.0)


def run_bench(name: str, args: argparse.Namespace, collection: Collection, until: float) -> int:
    """Exit status. After a death the benchmark is run again without the provider at work."""
    without, before, code = list(args.without), None, 0
    while True:
        code = run_once(name, args, without, collection, until, before)
        part = collection.parts.get(name)
        is_time_left = until - time.monotonic() > WORTH_REPEATING_S
        if code == 0 or part is None or not is_time_left:
            return code
        culprit = part["provider"]
        if culprit is None or culprit in without:
            return code
        print(f"-- {name} again, without {culprit}: exit status {code}", flush=True)
        without.append(culprit)
        before = {**part, "rows": [*part["rows"], *epitaph(part, culprit, code)]}


def epitaph(part: dict[str, Any], culprit: str, code: int) -> list[dict[str, Any]]:
    """Rows that say what became of the provider in the tasks where it was never timed."""
    told = {row["task"] for row in part["rows"] if row["provider"] == culprit}
    reason = f"the process died ({part['ended']}), exit status {code}"
    blank = {"provider": culprit, "status": "failed", "reason": reason, "note": ""}
    samples = {row["task"]: row for row in part["rows"] if row["task"] not in told}
    keys = ("task", "shape", "dtype", "device")
    return [{**{key: row[key] for key in keys}, **blank} for row in samples.values()]


def run_once(
    name: str,
    args: argparse.Namespace,
    without: list[str],
    collection: Collection,
    until: float,
    before: dict[str, Any] | None,
) -> int:
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / f"{name}.json"
        seconds = max(until - time.monotonic() - START_S, 1.0)
        process = subprocess.Popen(command(name, args, without, part, seconds), cwd=ROOT)
        try:
            code = watch(process, until + GRACE_S, lambda: collection.take(name, part, before))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        collection.take(name, part, before)
        return code


def watch(process: subprocess.Popen, until: float, look: Any) -> int:
    """Exit status of the process, which is killed at the end of its time."""
    while time.monotonic() < until:
        try:
            return process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            look()
    process.kill()
    return process.wait()


def command(
    name: str, args: argparse.Namespace, without: list[str], part: Path, seconds: float
) -> list[str]:
    words = [sys.executable, str(ROOT / "perf" / f"bench_{name}.py"), "--part", str(part)]
    words += ["--minutes", f"{seconds / 60:.3f}"]
    for option in ("device", "shrink", "peers", "commit"):
        if getattr(args, option) is not None:
            words += [f"--{option}", str(getattr(args, option))]
    for option, names in (("only", args.only), ("without", without)):
        words += [f"--{option}", *names] if names else []
    return words


if __name__ == "__main__":
    sys.exit(main())
