"""How much does the buffer take in, and does anybody wait for it?

    python perf/bench_buffer.py                      # 10, 100 and 500 actors
    python perf/bench_buffer.py --actors 10 --rounds 1 --seconds 2

Full groups of the published size (16 responses of 20,480 tokens) are uploaded as fast as they are
acknowledged, while every actor sends heartbeats with new tokens; a learner takes, commits and, in
one of the phases, reads every batch. In turns with that, in the same call: the same bytes over
HTTPS to a server that keeps nothing, and the same bytes appended to a file with fdatasync. One
machine serves and loads. Writes one JSON and one Markdown file, after every round.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from buffer_bench import load
from buffer_bench.scene import GROUP_SIZE, Served, Trainer, make_run
from dapo_hpc.run_dir import RunDir
from kernel_bench import ROOT, machine
from kernel_bench.record import write_text
from run_all import free_place

ACTORS = (10, 100, 500)
GROUP_BYTES = GROUP_SIZE * load.TOKENS * 8
"""An int32 and a float32 for each token."""
NEEDED_MB_PER_S = (11, 34)
"""Payload of the published 32B run, docs/buffer.md."""
SHARE_OF_BASELINE = 0.6
BEAT_P99_S = 0.1

Row = dict[str, Any]


def main() -> int:
    args = parser().parse_args()
    found = header(args)
    for num_actors in args.actors:
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            for row in measure(Path(folder), num_actors, args.rounds, args.seconds):
                found["rows"] = [r for r in found["rows"] if r["actors"] != num_actors] + [row]
                found["load_average_after"] = os.getloadavg()[0]
                write(found)
    print(markdown(found))
    print(f"written: {found['place']}.json and .md")
    return 0


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--actors", type=int, nargs="+", default=list(ACTORS))
    words.add_argument("--rounds", type=int, default=3, help="turns of each phase")
    words.add_argument("--seconds", type=float, default=6.0, help="of one phase")
    words.add_argument("--scratch", type=Path, help="file system to measure; default: /tmp")
    words.add_argument("--output", type=Path, metavar="FOLDER", help="results; else perf/results")
    words.add_argument("--commit", metavar="HASH", help="of this tree, where git cannot tell")
    return words


def header(args: argparse.Namespace) -> Row:
    described = machine.describe(torch.device("cpu"), args.commit)
    folder = args.output or ROOT / "perf" / "results"
    name = f"{time.strftime('%Y-%m-%d')}_buffer_{described['commit']}"
    return {
        "question": "what the buffer takes in",
        "place": str(free_place(folder / name)),
        "machine": described | {"cores": len(os.sched_getaffinity(0))},
        "load_average": os.getloadavg()[0],
        "group_bytes": GROUP_BYTES,
        "heartbeat": {"seconds": load.BEAT_S, "tokens": GROUP_SIZE * load.BEAT_TOKENS},
        "uploads": load.UPLOADS,
        "seconds": args.seconds,
        "rounds": args.rounds,
        "rows": [],
    }


# ------------------------------------------------------------------ one number of actors


def measure(folder: Path, num_actors: int, rounds: int, seconds: float) -> Iterator[Row]:
    """The row after each round."""
    run = make_run(folder, num_actors)
    served = Served(run)
    trainer = Trainer(run)
    rates: dict[str, list[float]] = {}
    calls: load.Timings = {}
    with plain_server(run) as port, beating(run, num_actors) as beats:
        trainer.start()
        for number in range(rounds):
            phases: dict[str, Callable[[], float]] = {
                "append": lambda: append(folder / "appended", seconds / 2),
                "https": lambda: plain(run, port, seconds / 2),
                "submit": lambda: submit(run, seconds, calls),
                "submit and read": lambda: reading(trainer, run, seconds, calls),
            }
            for name, phase in phases.items():
                rates.setdefault(name, []).append(phase())
            print(f"{num_actors} actors, round {number + 1} of {rounds}", flush=True)
            yield row(num_actors, rates, calls, served)
        trainer.is_over = True
    calls |= beats()
    yield row(num_actors, rates, calls, served)
    served.stop()


def append(path: Path, seconds: float) -> float:
    """Bytes a second: append, fdatasync, again."""
    content = os.urandom(GROUP_BYTES)
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    began, count = time.monotonic(), 0
    while time.monotonic() < began + seconds:
        os.write(descriptor, content)
        os.fdatasync(descriptor)
        count += 1
    passed = time.monotonic() - began
    os.close(descriptor)
    path.unlink()
    return count * GROUP_BYTES / passed


def plain(run: RunDir, port: int, seconds: float) -> float:
    timings = worked(load.upload_plain, run.root, port, GROUP_BYTES, seconds)
    return rate(timings)


def submit(run: RunDir, seconds: float, calls: load.Timings) -> float:
    timings = worked(load.upload, run.root, seconds)
    for call, entries in timings.items():
        calls.setdefault(call, []).extend(entries)
    return rate(timings)


def reading(trainer: Trainer, run: RunDir, seconds: float, calls: load.Timings) -> float:
    trainer.is_reading = True
    try:
        return submit(run, seconds, calls)
    finally:
        trainer.is_reading = False


def rate(timings: load.Timings) -> float:
    """Bytes a second from the first answer to the last."""
    at = sorted(end for end, _ in timings.get("submit", []))
    return (len(at) - 1) * GROUP_BYTES / (at[-1] - at[0]) if len(at) > 1 else 0.0


def worked(work: Any, *words: Any) -> load.Timings:
    """Run a coroutine of `load` in a process of its own."""
    process, pipe = _begin(work, *words)
    found: load.Timings = pipe.recv()
    process.join()
    return found


def _begin(work: Any, *words: Any) -> tuple[Any, Any]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=load.in_process, args=(work, theirs, *words))
    process.start()
    theirs.close()
    return process, mine


@contextmanager
def beating(run: RunDir, num_actors: int) -> Iterator[Callable[[], load.Timings]]:
    """Actors that send heartbeats while the context lasts; then the function gives their times."""
    context = multiprocessing.get_context("spawn")
    is_ready, is_over = context.Event(), context.Event()
    process, pipe = _begin(load.beat, run.root, num_actors, is_ready, is_over)
    if not is_ready.wait(120):
        raise RuntimeError(f"{num_actors} actors did not get a lease each within 120 s.")
    try:
        yield pipe.recv
    finally:
        is_over.set()


@contextmanager
def plain_server(run: RunDir) -> Iterator[int]:
    port_file = run.root / "plain_port"
    command = [sys.executable, "-m", "buffer_bench.plain", str(run.root), str(port_file)]
    process = subprocess.Popen(command, cwd=ROOT / "perf")
    try:
        while not (port_file.exists() and port_file.read_text()):
            time.sleep(0.05)
        yield int(port_file.read_text())
    finally:
        process.terminate()
        process.wait()


# ------------------------------------------------------------------ the document


def row(
    num_actors: int,
    rates: dict[str, list[float]],
    calls: load.Timings,
    served: Served,
) -> Row:
    medians = {name: statistics.median(values) / 1e6 for name, values in rates.items()}
    baseline = min(medians["append"], medians["https"])
    return {
        "actors": num_actors,
        **{f"{name} MB/s": round(value, 1) for name, value in medians.items()},
        "groups/s": round(medians["submit"] * 1e6 / GROUP_BYTES, 1),
        "share of the slower baseline": round(medians["submit"] / baseline, 2),
        **{
            f"{call} {word} ms": round(1e3 * value, 1)
            for call, entries in sorted(calls.items())
            for word, value in percentiles([took for _, took in entries]).items()
        },
        **{f"{call}s": len(entries) for call, entries in sorted(calls.items())},
        "buffer MiB": round(served.memory_mib()),
        "buffer CPU ms a group": round(1e3 * served.cpu_s() / max(1, len(calls["submit"])), 1),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98]}


def write(found: Row) -> None:
    place = Path(found["place"])
    content = {name: value for name, value in found.items() if name != "place"}
    write_text(place.with_name(place.name + ".json"), json.dumps(content, indent=1) + "\n")
    write_text(place.with_name(place.name + ".md"), markdown(found))


def markdown(found: Row) -> str:
    """Figures down, numbers of actors across."""
    rows = found["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row if name != "actors"))
    low, high = NEEDED_MB_PER_S
    lines = [
        f"# The buffer, {found['machine']['commit']}",
        "",
        f"{found['machine']['cores']} cores serve and load; load average before "
        f"{found['load_average']:.2f}. Groups of {found['group_bytes'] / 1e6:.2f} MB; heartbeats "
        f"of {found['heartbeat']['tokens']} tokens every {found['heartbeat']['seconds']:.0f} s "
        f"from each actor; {found['uploads']} uploads at a time; medians of "
        f"{found['rounds']} rounds. The published 32B run needs {low} to {high} MB/s.",
        "",
        "| actors | " + " | ".join(str(row["actors"]) for row in rows) + " |",
        "| --- |" + " ---: |" * len(rows),
    ]
    lines += [f"| {n} | " + " | ".join(str(row.get(n, "")) for row in rows) + " |" for n in names]
    for row in rows:
        share, beat = row["share of the slower baseline"], row.get("heartbeat p99 ms")
        if beat is not None:
            lines += [
                "",
                f"{row['actors']} actors: {share} of the slower baseline (target "
                f"{SHARE_OF_BASELINE}); heartbeats p99 {beat} ms (target {1e3 * BEAT_P99_S:.0f}).",
            ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
