"""What the kernels should reach, and whether they did in this run.

Source of the bounds: a study of the peers and of the hardware before the kernels were written.
Shares of a ceiling hold on any card; times in milliseconds would not, so there are none, but for
the loss alone, which waits for its launch and not for memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .task import OURS, Row

FORWARD = "logprob forward"
BOTH = "logprob forward+backward"
LOSS_OF_LOGITS = "loss from logits"
HALF = "logprob forward+backward, every other row"
LINEAR = "linear_dapo_loss"
SCORING = "linear_logprob without gradient"
LOSS = "dapo_loss"
BF16 = f"{OURS}, bf16 logits"
HALF_ROWS = f"{OURS}, every other row"
ONE_LAUNCH = f"{OURS}, one launch"
GRAPH = f"{OURS}, graph of 20"
FEW = "dapo_loss, an eighth of the tokens"

Rows = dict[tuple[str, str], Row]
"""(task, provider) to the measured row."""
Figure = Callable[[Rows], float | None]
"""None where the rows do not say."""


def shard_task(ranks: int) -> str:
    return f"{BOTH}, 1/{ranks} of the vocabulary"


@dataclass(frozen=True)
class Target:
    task: str
    what: str
    bound: float
    figure: Figure
    unit: str = ""
    at_least: bool = True

    def judge(self, rows: Rows) -> dict[str, Any]:
        measured = self.figure(rows)
        met = None
        if measured is not None:
            met = measured >= self.bound if self.at_least else measured <= self.bound
        return {
            "task": self.task,
            "target": self.what,
            "bound": self.bound,
            "is": "at least" if self.at_least else "at most",
            "unit": self.unit,
            "measured": measured,
            "met": met,
        }


def judge(rows: list[Row]) -> list[dict[str, Any]]:
    """Every target beside what these rows say; rows of a CPU say nothing."""
    measured = {
        (row["task"], row["provider"]): row
        for row in rows
        if row["status"] == "measured" and row["device"] == "cuda"
    }
    return [target.judge(measured) for target in TARGETS]


# ------------------------------------------------------------------ kinds of target


def _value(task: str, provider: str, name: str, scale: float = 1.0) -> Figure:
    def figure(rows: Rows) -> float | None:
        value = rows.get((task, provider), {}).get(name)
        return None if value is None else value * scale

    return figure


def _share(task: str, bound: float, provider: str = OURS) -> Target:
    """Of the floor that this run's copy and matmul rates give."""
    who = "" if provider == OURS else provider.removeprefix(OURS)
    figure = _value(task, provider, "share", 100.0)
    return Target(task, f"share of the ceiling{who}", bound * 100, figure, "%")


def _faster(task: str, peer: str, bound: float, ours: str = OURS) -> Target:
    def figure(rows: Rows) -> float | None:
        here, there = rows.get((task, ours)), rows.get((task, peer))
        return there["ms"] / here["ms"] if here and there else None

    return Target(task, f"times as fast as {peer}", bound, figure, "x")


def _time(task: str, provider: str, bound_us: float) -> Target:
    who = provider.removeprefix(OURS)
    return Target(task, f"time{who}", bound_us, _value(task, provider, "ms", 1e3), "us", False)


def _accuracy(what: str, task: str, result: str, kind: str, bound: float) -> Target:
    def figure(rows: Rows) -> float | None:
        errors = rows.get((task, OURS), {}).get("errors", {})
        return errors.get(result, {}).get(kind)

    return Target(task, what, bound, figure, at_least=False)


def _extra_memory(bound_gb: float) -> Target:
    """Beyond the gradient of hidden, which every provider returns."""

    def figure(rows: Rows) -> float | None:
        row = rows.get((LINEAR, OURS))
        if row is None or row.get("extra_memory_mib") is None:
            return None
        gradient = 2 * row["shape"]["tokens"] * row["shape"]["hidden"]
        return (row["extra_memory_mib"] * 2**20 - gradient) / 1e9

    what = "extra memory without the gradient of hidden"
    return Target(LINEAR, what, bound_gb, figure, "GB", False)


def _skipping(bound: float) -> Target:
    def figure(rows: Rows) -> float | None:
        whole, half = rows.get((LINEAR, OURS)), rows.get((LINEAR, HALF_ROWS))
        return whole["ms"] / half["ms"] if whole and half else None

    return Target(LINEAR, "every other row, times as fast as all", bound, figure, "x")


TARGETS = (
    _share(FORWARD, 0.92),
    _faster(FORWARD, "TRL", 0.98),
    _faster(FORWARD, "flash-attn", 1.0),
    _faster(FORWARD, "Liger", 3.3),
    _faster(FORWARD, "Megatron", 13.0),
    _share(BOTH, 0.85),
    _faster(BOTH, "TRL", 1.0),
    _faster(BOTH, "flash-attn", 1.0),
    _faster(BOTH, "Liger", 3.0),
    _faster(BOTH, "Megatron", 7.0),
    _faster(BOTH, "QuACK", 0.95),
    _share(LOSS_OF_LOGITS, 0.92),
    _faster(LOSS_OF_LOGITS, "Liger GRPO", 1.2),
    *(_share(shard_task(ranks), 0.80) for ranks in (2, 4, 8)),
    _share(LINEAR, 0.88),
    _share(LINEAR, 0.916, BF16),
    _faster(LINEAR, "Liger scaled CE", 1.3),
    _faster(LINEAR, "verl", 2.0),
    _faster(LINEAR, "verl torch", 4.0),
    _faster(LINEAR, "Liger FLCE", 4.0),
    _faster(LINEAR, "QuACK", 0.95),
    _extra_memory(1.3),
    _skipping(1.9),
    _share(SCORING, 0.856),
    _share(SCORING, 0.911, BF16),
    _faster(SCORING, "Liger scaled CE", 0.95),
    _faster(SCORING, "verl", 1.6),
    _time(LOSS, ONE_LAUNCH, 8.0),
    _time(LOSS, GRAPH, 5.0),
    Target(
        FEW,
        f"kernels{ONE_LAUNCH.removeprefix(OURS)}",
        1,
        _value(FEW, ONE_LAUNCH, "kernels"),
        at_least=False,
    ),
    _faster(LOSS, "torch eager", 25.0),
    _faster(LOSS, "torch.compile", 2.0),
    _accuracy("error of a log-prob over the largest logit", FORWARD, "logprobs", "per_logit", 2e-6),
    _accuracy("error of the worst row of the gradient", BOTH, "grad_logits", "worst_row", 2**-8),
    _accuracy("error of the gradient of weight", LINEAR, "grad_weight_of_loss", "relative", 1e-3),
)
