"""What does a step of the demo cost, and where does the time go?

    python perf/bench_demo.py                 # our run: seconds of each part, CPU, memory
    python perf/bench_demo.py --peer trl      # the same, then TRL's GRPOTrainer beside it

Two runs of each system from the same base model: one with evaluation every second step (seconds and
samples to 0.90), one without (seconds and CPU seconds per step). Ours comes three times: as the
demo is, with buffer.max_staleness = 1, and without dynamic sampling. Writes one JSON file to
`perf/results/`. The base model is trained first if it is not there.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dapo_hpc.config import RunConfig, load
from dapo_hpc.observe import metrics
from dapo_hpc.run_dir import RunDir

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "demo.toml"
SAMPLES_PER_BATCH = 384
TARGET = 0.90
OURS = {
    "dapo_hpc": (),
    "async": ("buffer.max_staleness=1",),
    "like_peer": ("buffer.dynamic_sampling=false",),
}
"""Ours: as in the paper; sampling while training; and without dynamic sampling, as the peer."""
PARTS = ("wait", "fetch", "score", "update", "publish", "checkpoint")

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=["trl"], help="also run this system")
    parser.add_argument("--peer-python", default=str(ROOT / ".venv-peer" / "bin" / "python"))
    parser.add_argument("--steps", type=int, default=16, help="rollout steps of the learning run")
    parser.add_argument("--cost-steps", type=int, default=8, help="rollout steps of the cost run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs" / "bench")
    args = parser.parse_args()

    config = load(CONFIG)
    prepare(args.seed)
    result: Row = {
        "question": "cost of a demo step",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "seed": args.seed,
        "threads": {"engine": config.rollout.threads, "learner": config.learner.threads},
    }
    for system, settings in OURS.items():
        learning = run_ours(args, "learning", settings, steps=args.steps, eval_every=2)
        cost = run_ours(args, "cost", settings, steps=args.cost_steps, eval_every=0)
        result[system] = summary_of_ours(learning, cost, config)
    if args.peer:
        learning = run_peer(args, config, steps=args.steps, eval_every=2)
        cost = run_peer(args, config, steps=args.cost_steps, eval_every=0)
        result[args.peer] = summary_of_peer(learning, cost)
    path = ROOT / "perf" / "results" / f"{result['date']}_demo_{result['commit']}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    show(result, args.peer)
    print(f"\nwritten: {path.relative_to(ROOT)}")
    return 0


# ------------------------------------------------------------------ running


def dapo(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "dapo_hpc.cli", *words], cwd=ROOT, check=True)


def prepare(seed: int) -> None:
    """The demo's files and base model, unless they are there."""
    config = load(CONFIG)
    if not (ROOT / config.prompts.train).exists():
        dapo("demo-data", str((ROOT / config.prompts.train).parent), "--seed", str(seed))
    if not (ROOT / config.model.path / "config.json").exists():
        dapo("sft", str(CONFIG), "--set", f"run.seed={seed}")


def run_ours(
    args: argparse.Namespace,
    name: str,
    settings: Sequence[str],
    *,
    steps: int,
    eval_every: int,
) -> list[Row]:
    """Step rows of a fresh run, with `wall_s` since the launcher was started."""
    run = RunDir(args.scratch / name)
    shutil.rmtree(run.root, ignore_errors=True)
    started_s = time.time()
    dapo(
        "train",
        str(CONFIG),
        *("--set", f"run.dir={args.scratch}", "--set", f"run.name={name}"),
        *("--set", f"run.seed={args.seed}", "--set", f"run.total_steps={steps}"),
        *("--set", f"eval.every={eval_every}"),
        *(word for setting in settings for word in ("--set", setting)),
    )
    accuracy = {r["step"]: r["eval/accuracy"] for r in metrics.read(run.metrics, "eval")}
    rows = metrics.read(run.metrics, "step")
    for row in rows:
        row["wall_s"] = row["unix_s"] - started_s
        row["accuracy"] = accuracy.get(row["step"])
    return rows


def run_peer(
    args: argparse.Namespace, config: RunConfig, *, steps: int, eval_every: int
) -> list[Row]:
    command = [args.peer_python, str(ROOT / "perf" / f"peer_{args.peer}.py")]
    command += ["--model", config.model.path, "--train", config.prompts.train]
    command += ["--heldout", str(config.prompts.eval), "--steps", str(steps)]
    command += ["--eval-every", str(eval_every), "--eval-samples", str(config.eval.samples)]
    command += ["--seed", str(args.seed), "--threads", str(config.learner.threads)]
    command += ["--output", str(args.scratch / "peer")]
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(config.learner.threads),
    }
    process = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    lines = [line for line in process.stdout.splitlines() if line.startswith('{"step"')]
    return [json.loads(line) for line in lines]


# ------------------------------------------------------------------ figures


def summary_of_ours(learning: list[Row], cost: list[Row], config: RunConfig) -> Row:
    group_size = config.rollout.group_size
    finished = ("buffer/groups_informative", "buffer/groups_all_correct", "buffer/groups_all_wrong")

    def samples(row: Row) -> float:
        return group_size * sum(row[name] for name in finished)

    reached = next((r for r in learning if (r["accuracy"] or 0) >= TARGET), None)
    warm, last = cost[1], cost[-1]
    cpu_s = {
        role: last[f"{role}/cpu_s"] - warm[f"{role}/cpu_s"]
        for role in ("learner", "actor", "buffer")
    }
    batches = (samples(last) - samples(warm)) / SAMPLES_PER_BATCH
    measured = cost[2:]
    return {
        "startup_s": cost[0]["wall_s"] - cost[0]["learner/step_s"],
        "step_s": statistics.median(r["learner/step_s"] for r in measured),
        "parts_s": {part: median_of(measured, f"learner/{part}_s") for part in PARTS},
        "tokens_per_s": statistics.median(r["actor/tokens_per_s"] for r in measured),
        "learner_idle_frac": statistics.median(r["learner/idle_frac"] for r in measured),
        "samples_per_step": (samples(last) - samples(warm)) / (last["step"] - warm["step"]),
        "cpu_s_per_384_samples": sum(cpu_s.values()) / batches,
        "cpu_s_per_step": sum(cpu_s.values()) / (last["step"] - warm["step"]),
        "cpu_s_per_384_samples_by_process": {k: v / batches for k, v in cpu_s.items()},
        "peak_memory_mib": {
            role: last[f"{role}/peak_memory_mib"] for role in ("learner", "actor", "buffer")
        },
        "steps_to_target": reached["step"] if reached else None,
        "wall_s_to_target": reached["wall_s"] if reached else None,
        "samples_to_target": samples(reached) if reached else None,
        "accuracy": {r["step"]: r["accuracy"] for r in learning if r["accuracy"] is not None},
    }


def median_of(rows: list[Row], name: str) -> float:
    """Over the rows that have it: only some steps write a checkpoint."""
    return statistics.median([row[name] for row in rows if name in row] or [0.0])


def summary_of_peer(learning: list[Row], cost: list[Row]) -> Row:
    reached = next((r for r in learning if r["step"] and r.get("accuracy", 0) >= TARGET), None)
    warm, last = cost[2], cost[-1]
    seconds = [b["elapsed_s"] - a["elapsed_s"] for a, b in zip(cost[2:], cost[3:], strict=False)]
    cpu_s = (last["cpu_s"] - warm["cpu_s"]) / (last["step"] - warm["step"])
    return {
        "startup_s": cost[0]["elapsed_s"],
        "step_s": statistics.median(seconds),
        "samples_per_step": SAMPLES_PER_BATCH,
        "cpu_s_per_384_samples": cpu_s,
        "cpu_s_per_step": cpu_s,
        "peak_memory_mib": {"trainer": last["peak_memory_mib"]},
        "steps_to_target": reached["step"] if reached else None,
        "wall_s_to_target": reached["elapsed_s"] if reached else None,
        "samples_to_target": reached["samples"] if reached else None,
        "accuracy": {r["step"]: r["accuracy"] for r in learning if "accuracy" in r},
    }


def commit() -> str:
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def machine() -> str:
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    cores = Path("/proc/cpuinfo").read_text().count("processor\t")
    return f"{cores} cores, {model}"


# ------------------------------------------------------------------ showing


def show(result: Row, peer: str | None) -> None:
    systems = [*OURS, *([peer] if peer else [])]
    print(f"\n{result['machine']}; commit {result['commit']}; seed {result['seed']}")
    for name in OURS:
        show_parts(name, result[name])
    print(f"\n{'':28}" + "".join(f"{name:>12}" for name in systems))
    names = ("startup_s", "step_s", "samples_per_step", "cpu_s_per_384_samples", "cpu_s_per_step")
    names += ("steps_to_target", "wall_s_to_target", "samples_to_target")
    for name in names:
        cells = [result[system][name] for system in systems]
        print(f"{name:28}" + "".join(f"{'-' if c is None else f'{c:.2f}':>12}" for c in cells))
    for system in systems:
        memory = ", ".join(f"{k} {v:.0f}" for k, v in result[system]["peak_memory_mib"].items())
        print(f"{system}: peak memory MiB: {memory}")
    print(
        "\nNot in these figures: a GPU. On models of this size vLLM samples no faster than\n"
        "transformers; and dynamic sampling draws more samples for each step than the peer does."
    )


def show_parts(name: str, ours: Row) -> None:
    parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in ours["parts_s"].items())
    by_process = ours["cpu_s_per_384_samples_by_process"].items()
    print(f"{name}: seconds of a step: {parts}")
    print("  CPU seconds per 384 samples: " + ", ".join(f"{k} {v:.2f}" for k, v in by_process))
    print(f"  tokens/s {ours['tokens_per_s']:.0f}, learner idle {ours['learner_idle_frac']:.0%}")


if __name__ == "__main__":
    sys.exit(main())
