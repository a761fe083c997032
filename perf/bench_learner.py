"""What does a step of the learner cost in each layout, beside a plain step on transformers?

    python perf/bench_learner.py --output FOLDER           # a small model; a GPU's if there is one
    python perf/bench_learner.py --model 1.5b --only ours plain

Scoring, forward with backward, and the optimizer are timed apart. All teams take turns in the same
call, on the same weights and sequences. Writes one JSON and one Markdown file, after every round.
See perf/PROTOCOL.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kernel_bench import ROOT, machine
from kernel_bench.record import write_text
from kernel_bench.report import result_name
from learner_bench.batch import draw, sequences
from learner_bench.report import OURS, markdown, rows_of, targets_of
from learner_bench.shapes import ARCHITECTURES, LOADS, write_model
from learner_bench.task import Job
from learner_bench.teams import Match, Team
from run_all import free_place

SEED = 0
ROUNDS = 7
WARM_UP = 2
"""Rounds that are not counted: first use of allocators, kernels and moments."""
LAYOUTS: dict[str, dict[str, int]] = {
    "ours, TP2": {"tensor": 2},
    "ours, PP2": {"pipeline": 2},
    "ours, DP2": {"data": 2},
}
CEILING = "matmul"
QUIET = 0.5
"""Load average for each core above which other work is likely to be in the figures."""


def main() -> int:
    args = parser().parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.model = args.model or ("0.5b" if device == "cuda" else "small")
    prepare_environment(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        found, teams = measure(args, device, Path(folder))
    text = markdown(found)
    print(text)
    print(f"written: {found['place']}.json and .md")
    ours = teams.get(OURS)
    return int(ours is None or not ours.turns)


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--model", choices=list(ARCHITECTURES), help="default: small; 0.5b on a GPU")
    words.add_argument("--device", choices=["cuda", "cpu"], help="default: a GPU if there is one")
    words.add_argument("--rounds", type=int, default=ROUNDS, help="steps of every team")
    words.add_argument("--threads", type=int, default=1, help="of each process, on a CPU")
    words.add_argument("--only", nargs="+", default=[], help="teams whose names begin so")
    words.add_argument("--output", type=Path, metavar="FOLDER", help="results; else perf/results")
    words.add_argument("--commit", metavar="HASH", help="of this tree, where git cannot tell")
    return words


def prepare_environment(threads: int) -> None:
    """What the processes inherit."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    torch.set_num_threads(threads)


def measure(
    args: argparse.Namespace, device: str, folder: Path
) -> tuple[dict[str, Any], dict[str, Team]]:
    """The document, on disk after every round, and the teams."""
    found = header(args, device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    write_model(folder / "model", ARCHITECTURES[args.model], dtype, SEED)
    jobs = jobs_of(args, device, folder / "model")
    with Match(jobs, left_out(jobs, device), device) as match:
        for number in range(WARM_UP + args.rounds):
            match.round(is_kept=number >= WARM_UP)
            if number >= WARM_UP:
                found |= results(args, device, match.teams)
                write(found)
    if "rows" not in found:
        raise SystemExit("--rounds must be at least 1.")
    return found, match.teams


def jobs_of(args: argparse.Namespace, device: str, model: Path) -> dict[str, Job]:
    """Team to what it does: ours, the plain ones, ours in layouts, and the ceiling."""
    ours = Job(
        name=OURS,
        kind="ours",
        architecture=ARCHITECTURES[args.model],
        load=LOADS[args.model],
        model=model,
        device="cuda" if device == "cuda" else "cpu",
        dtype="bfloat16" if device == "cuda" else "float32",
        threads=args.threads,
    )
    jobs = [
        ours,
        replace(ours, name="plain, padded", kind="padded"),
        replace(ours, name="plain, by length", kind="by length"),
    ]
    if device == "cuda":
        fast = {"kind": "by length", "is_plainly_bfloat16": True}
        jobs.append(replace(ours, name="plain, by length, all bfloat16", **fast))
    jobs += [replace(ours, name=name, **sizes) for name, sizes in LAYOUTS.items()]
    chosen = [job for job in jobs if not args.only or job.name.startswith(tuple(args.only))]
    chosen.append(replace(ours, name=CEILING, kind="matmul"))
    return {job.name: job for job in chosen}


def left_out(jobs: dict[str, Job], device: str) -> dict[str, str]:
    """Layouts that this machine has no devices for, and why."""
    count = torch.cuda.device_count() if device == "cuda" else sys.maxsize
    return {
        name: f"needs {job.world} GPUs, there are {count}; NCCL takes one rank for each"
        for name, job in jobs.items()
        if job.world > count
    }


# ------------------------------------------------------------------ the document


def header(args: argparse.Namespace, device: str) -> dict[str, Any]:
    first = torch.device(device, 0) if device == "cuda" else torch.device(device)
    described = machine.describe(first, args.commit)
    described |= {
        "transformers": version("transformers"),
        "megatron-core": version("megatron-core"),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
    }
    if described["load_average"] > QUIET * described["cores"]:
        print(f"load average {described['load_average']:.1f}: this machine is not quiet")
    architecture, load = ARCHITECTURES[args.model], LOADS[args.model]
    batch = sequences(draw(load, architecture.vocab, SEED))
    responses = [response for _, response in batch]
    folder = args.output or ROOT / "perf" / "results"
    return {
        "question": "what a step of the learner costs, beside a plain step",
        "place": str(free_place(folder / result_name(described, "learner"))),
        "machine": described,
        "model": args.model,
        "architecture": architecture.named(),
        "parameters": architecture.parameters(),
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "threads": args.threads,
        "load": load.named(),
        "batch": {
            "sequences": len(batch),
            "tokens": sum(map(sum, batch)),
            "response_tokens": sum(responses),
            "shortest": min(responses),
            "longest": max(responses),
        },
    }


def results(args: argparse.Namespace, device: str, teams: dict[str, Team]) -> dict[str, Any]:
    """Rows and targets so far."""
    batch = sequences(draw(LOADS[args.model], ARCHITECTURES[args.model].vocab, SEED))
    turns = teams[CEILING].turns
    rate = statistics.median(turn.check["flops_per_s"] for turn in turns) if turns else None
    return {
        "rounds": max(len(team.turns) for team in teams.values()),
        "matmul_flops_per_s": rate,
        "load_average_after": os.getloadavg()[0],
        "rows": rows_of(teams, batch, rate),
        "targets": targets_of(teams, device),
    }


def write(found: dict[str, Any]) -> None:
    place = Path(found["place"])
    content = {name: value for name, value in found.items() if name != "place"}
    write_text(place.with_name(place.name + ".json"), json.dumps(content, indent=1) + "\n")
    write_text(place.with_name(place.name + ".md"), markdown(found))


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    sys.exit(main())
