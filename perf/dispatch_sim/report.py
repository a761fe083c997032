"""Means over steps and seeds, and the table."""

from __future__ import annotations

from statistics import mean
from typing import Any

from .policies import CLOSINGS, ORACLE, POLICIES, REPEAT
from .record import Step

Row = dict[str, Any]
COLUMNS = (
    ("", "policy", "s"),
    ("s", "seconds", ".0f"),
    ("to oracle", "to_oracle", ".2f"),
    ("verl / it", "repeat_over", ".2f"),
    ("first step to oracle", "first_to_oracle", ".2f"),
    ("prompts", "num_dispatched", ".0f"),
    ("M tokens", "million_tokens", ".1f"),
    ("waste", "waste_frac", ".0%"),
    ("first step M tokens", "first_million_tokens", ".1f"),
    ("used mean", "used_mean", ".0f"),
    ("of dispatched", "length_ratio", ".3f"),
    ("tail wait s", "tail_wait_s", ".0f"),
    ("predicted", "predicted", ".3f"),
    ("accepted", "accepted", ".3f"),
)
NUM_OURS = 3
"""The last columns, which only the buffer measures."""


def rows_of(results: dict[str, list[list[Step]]]) -> list[Row]:
    """One for each policy from its [seeds][steps]; the first step of a run is kept apart."""
    rows = [_row(policy, results[policy]) for policy in POLICIES if policy in results]
    by_policy = {row["policy"]: row for row in rows}
    repeat_s = min((by_policy[name]["seconds"] for name in REPEAT if name in by_policy), default=0)
    for row in rows:
        row["to_oracle"] = row["seconds"] / by_policy[ORACLE]["seconds"]
        row["first_to_oracle"] = row["first_seconds"] / by_policy[ORACLE]["first_seconds"]
        row["repeat_over"] = repeat_s / row["seconds"]
    return rows


def _row(policy: str, seeds: list[list[Step]]) -> Row:
    first = [steps[0] for steps in seeds]
    later = [step for steps in seeds for step in steps[1:]]
    tokens = sum(step.tokens for step in later)
    used = sum(step.used_tokens for step in later)
    return {
        "policy": policy,
        "seconds": mean(step.seconds for step in later),
        "first_seconds": mean(step.seconds for step in first),
        "num_dispatched": mean(step.num_dispatched for step in later),
        "million_tokens": tokens / len(later) / 1e6,
        "first_million_tokens": mean(step.tokens for step in first) / 1e6,
        "waste_frac": 1 - used / tokens,
        "used_mean": mean(step.used_mean for step in later),
        "dispatched_mean": mean(step.dispatched_mean for step in later),
        "length_ratio": mean(s.used_mean for s in later) / mean(s.dispatched_mean for s in later),
        "tail_wait_s": mean(step.tail_wait_s for step in later),
        "predicted": mean(step.predicted for step in later),
        "accepted": mean(step.accepted for step in later),
    }


def table(rows: list[Row]) -> str:
    """Markdown; the last columns are of the buffer's own metrics."""
    lines = [" | ".join(title for title, _, _ in COLUMNS), " | ".join("---" for _ in COLUMNS)]
    for row in rows:
        num_cells = len(COLUMNS) if row["policy"] in CLOSINGS else len(COLUMNS) - NUM_OURS
        cells = [format(row[key], form) for _, key, form in COLUMNS[:num_cells]]
        lines.append(" | ".join(cells + [""] * (len(COLUMNS) - num_cells)))
    return "\n".join(f"| {line} |" for line in lines)
