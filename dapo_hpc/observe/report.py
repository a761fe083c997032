"""The picture of a run: how accuracy, length, entropy and time went, drawn from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapo_hpc.observe import metrics
from dapo_hpc.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]

PARTS = ("wait", "fetch", "score", "update", "publish", "checkpoint")
"""Seconds of a step, in order; see observe.metrics."""
TRAIN_COLOR, HELDOUT_COLOR = "#4477aa", "#cc6633"
PART_COLORS = ("#bbbbbb", "#88ccee", "#4477aa", "#cc6633", "#ddaa33", "#228833")


class NothingToDraw(ValueError):
    """The run has no finished step and no evaluation yet."""


def draw(run: RunDir) -> Path:
    """Write `report/curves.png` anew and return its path.

    Raises:
        NothingToDraw: metrics.jsonl holds neither a step nor an evaluation.
    """
    steps, evals = metrics.read(run.metrics, "step"), metrics.read(run.metrics, "eval")
    if not (steps or evals):
        raise NothingToDraw(f"{run.metrics} holds no finished step and no evaluation yet.")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, grid = pyplot.subplots(2, 3, figsize=(13, 7), dpi=110, layout="constrained")
    _draw_accuracy(grid[0][0], steps, evals)
    _draw_length(grid[0][1], steps, evals)
    _draw_line(grid[0][2], steps, "learner/entropy", "Entropy of the policy", "nats a token")
    _draw_kept(grid[1][0], steps)
    _draw_mismatch(grid[1][1], steps)
    _draw_seconds(grid[1][2], steps)
    for axes in grid.flat:
        axes.set_xlabel("rollout step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.suptitle(_title(run, steps, evals))
    run.report.mkdir(parents=True, exist_ok=True)
    path = run.report / "curves.png"
    temporary = path.with_name(".curves.tmp.png")
    figure.savefig(temporary)
    pyplot.close(figure)
    temporary.replace(path)
    return path


def _title(run: RunDir, steps: Sequence[Row], evals: Sequence[Row]) -> str:
    parts = [run.root.name, f"{steps[-1]['step'] if steps else 0} steps"]
    if evals:
        first, last = evals[0]["eval/accuracy"], evals[-1]["eval/accuracy"]
        parts.append(f"held-out accuracy {first:.2f} to {last:.2f}")
    return ", ".join(parts)


def _draw_accuracy(axes: Axes, steps: Sequence[Row], evals: Sequence[Row]) -> None:
    axes.set_title("Accuracy")
    axes.set_ylabel("share of responses correct")
    _plot(axes, steps, "train/accuracy", TRAIN_COLOR, "training prompts")
    _plot(axes, evals, "eval/accuracy", HELDOUT_COLOR, "held-out prompts", marker="o")
    axes.set_ylim(0, 1.02)
    axes.legend(loc="lower right", frameon=False)


def _draw_length(axes: Axes, steps: Sequence[Row], evals: Sequence[Row]) -> None:
    axes.set_title("Response length")
    axes.set_ylabel("tokens a response")
    _plot(axes, steps, "train/response_tokens_mean", TRAIN_COLOR, "train batch")
    name = "eval/response_tokens_mean"
    _plot(axes, evals, name, HELDOUT_COLOR, "held-out prompts", marker="o")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right", frameon=False)


def _draw_line(axes: Axes, rows: Sequence[Row], name: str, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_ylabel(unit)
    _plot(axes, rows, name, TRAIN_COLOR, "")
    axes.set_ylim(bottom=0)


def _draw_kept(axes: Axes, steps: Sequence[Row]) -> None:
    title, unit = "Groups kept by dynamic sampling", "share informative"
    _draw_line(axes, steps, "buffer/kept_frac", title, unit)
    axes.set_ylim(0, 1.02)


def _draw_mismatch(axes: Axes, steps: Sequence[Row]) -> None:
    """Logarithmic; a step without any difference has no point."""
    axes.set_title("Engine against learner")
    axes.set_ylabel("|log-prob difference|, nats")
    for name, color, label in (
        ("mismatch/max_diff", HELDOUT_COLOR, "largest token"),
        ("mismatch/mean_diff", TRAIN_COLOR, "mean"),
    ):
        positive = [row for row in steps if row.get(name, 0) > 0]
        _plot(axes, positive, name, color, label)
        if positive:
            axes.set_yscale("log")
    if axes.lines:
        axes.legend(frameon=False)


def _draw_seconds(axes: Axes, steps: Sequence[Row]) -> None:
    axes.set_title("Seconds of a step")
    axes.set_ylabel("s")
    if not steps:
        return
    x = [row["step"] for row in steps]
    parts = [[row.get(f"learner/{part}_s", 0.0) for row in steps] for part in PARTS]
    bottom = [0.0] * len(steps)
    for part, seconds, color in zip(PARTS, parts, PART_COLORS, strict=True):
        axes.bar(x, seconds, bottom=bottom, label=part, color=color, width=0.8)
        bottom = [low + more for low, more in zip(bottom, seconds, strict=True)]
    axes.set_ylim(0, max(bottom) * 1.25 or 1.0)
    axes.legend(frameon=False, ncols=3, fontsize="small", loc="upper right")


def _plot(
    axes: Axes, rows: Sequence[Row], name: str, color: str, label: str, *, marker: str = ""
) -> None:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if points:
        x, y = zip(*points, strict=True)
        marker = marker or ("." if len(points) == 1 else "")
        axes.plot(x, y, color=color, label=label, marker=marker, markersize=4)
