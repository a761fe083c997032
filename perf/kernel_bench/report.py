"""One Markdown text from the JSON of a run."""

from __future__ import annotations

import time
from typing import Any

from .task import Row

COLUMNS = ("", "ms", "p20 to p80", "of the ceiling", "host ms", "extra MiB", "error", "")


def result_name(machine: dict[str, Any], what: str) -> str:
    """`<date>_<what>_<gpu>_<commit>`, without an ending."""
    gpu = machine.get("gpu", machine["device"]).lower().replace(" ", "-")
    return f"{time.strftime('%Y-%m-%d')}_{what}_{gpu}_{machine['commit']}"


def markdown(found: dict[str, Any]) -> str:
    lines = [f"# Kernels on {_where(found['machine'])}", ""]
    lines += _header(found)
    for bench in found["benches"]:
        lines += ["", f"## {bench['name']}", *_ending(bench)]
        for task in _tasks(bench):
            lines += _task(task, [row for row in bench["rows"] if row["task"] == task["task"]])
    names = {entry["task"] for bench in found["benches"] for entry in _tasks(bench)}
    targets = [target for target in found["targets"] if target["task"] in names]
    return "\n".join([*lines, "", *_targets(targets)]) + "\n"


def _tasks(bench: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that ended, and those of which there are rows only."""
    done = [task["task"] for task in bench["tasks"]]
    begun = dict.fromkeys(row["task"] for row in bench["rows"])
    return [*bench["tasks"], *({"task": name} for name in begun if name not in done)]


def _where(machine: dict[str, Any]) -> str:
    return machine.get("gpu") or f"a CPU ({machine['cpu']})"


def _header(found: dict[str, Any]) -> list[str]:
    machine = found["machine"]
    versions = [f"{name} {machine[name]}" for name in ("driver", "cuda") if name in machine]
    versions += [f"{name} {machine[name]}" for name in ("torch", "triton", "python")]
    peers = ", ".join(f"{name} {version}" for name, version in found["peers"].items())
    lines = [
        f"{machine['date']}, commit {machine['commit']}; {', '.join(versions)}.",
        "",
        f"Peers: {peers}.",
        "",
        "Median of the launches, all providers of a table in turns in one process; share of the "
        "ceiling: least bytes over the copy rate, or least matrix FLOPs over the bfloat16 matmul "
        "rate, whichever takes longer, over the time. Both rates are measured just before each "
        "table. Extra memory: peak above what stood before the call. Error: the largest relative "
        "one against float64, on a small shape.",
    ]
    if machine["device"] != "cuda":
        lines += ["", "**On a CPU, with small shapes: these figures show that the script runs.**"]
    return lines


def _ending(bench: dict[str, Any]) -> list[str]:
    return [] if bench["ended"] == "done" else ["", f"Ended {bench['ended']}."]


def _task(task: dict[str, Any], rows: list[Row]) -> list[str]:
    lines = ["", f"### {task['task']}", ""]
    if "skipped" in task:
        return [*lines, f"Left out: {task['skipped']}."]
    if rows:
        lines += [_about(task, rows[0]), "", _cells(COLUMNS), "|" + "---|" * len(COLUMNS)]
    lines += [_cells(_row(row)) for row in rows if row["status"] == "measured"]
    others = [f"* {r['provider']}: {r['status']}: {r['reason']}" for r in rows if r["reason"]]
    return [*lines, *(["", *others] if others else [])]


def _about(task: dict[str, Any], row: Row) -> str:
    shape = " x ".join(f"{size} {name}" for name, size in row["shape"].items())
    words = [f"{shape}, {row['dtype']}, {row['device']}."]
    if "copy_bytes_per_s" in task:
        copy, matmul = task["copy_bytes_per_s"] / 1e12, task["matmul_flops_per_s"] / 1e12
        words.append(f"Copy {copy:.3g} TB/s, matmul {matmul:.3g} TFLOP/s.")
    clocks = task.get("clocks")
    if clocks:
        words.append(", ".join(f"{name} {value}" for name, value in clocks.items()) + ".")
    return " ".join(words)


def _row(row: Row) -> tuple[str, ...]:
    note = [row["note"]]
    if "kernels" in row:
        note.append(f"{row['kernels']} kernels")
    if "latency_ms" in row:
        note.append(f"{_figure(row['latency_ms'])} ms from Python")
    return (
        row["provider"],
        _figure(row["ms"]),
        f"{_figure(row['p20_ms'])} to {_figure(row['p80_ms'])}",
        f"{row['share']:.1%} ({row['bound']})",
        _figure(row["host_ms"]),
        "-" if row["extra_memory_mib"] is None else f"{row['extra_memory_mib']:.0f}",
        "-" if row.get("error") is None else f"{row['error']:.1e}",
        "; ".join(word for word in note if word),
    )


def _targets(targets: list[dict[str, Any]]) -> list[str]:
    lines = ["## Targets", "", _cells(("", "", "wanted", "measured", "")), "|" + "---|" * 5]
    words = {True: "met", False: "**not met**", None: "not measured"}
    for target in targets:
        measured = target["measured"]
        seen = "-" if measured is None else f"{_figure(measured)} {target['unit']}"
        wanted = f"{target['is']} {_figure(target['bound'])} {target['unit']}"
        lines.append(_cells((target["task"], target["target"], wanted, seen, words[target["met"]])))
    return lines


def _figure(value: float) -> str:
    """Four digits; small ones as powers of ten."""
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def _cells(words: tuple[str, ...]) -> str:
    return "| " + " | ".join(words) + " |"
