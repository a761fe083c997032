"""What a check has found: one sentence, and where something is wrong its cure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "note", "problem"]
"""A note is worth knowing and stops nobody; a problem makes `dapo doctor` exit 1."""

MARKS: dict[Level, str] = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}

CHECK_WIDTH = 26
"""Of the longest name of a check; lines are printed as they come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    check: str
    """Two or three words: what was looked at."""
    level: Level
    text: str
    cure: str = ""
    """What to do about it; never empty for a problem."""


def ok(check: str, text: str) -> Finding:
    return Finding(check=check, level="ok", text=text)


def note(check: str, text: str, cure: str = "") -> Finding:
    return Finding(check=check, level="note", text=text, cure=cure)


def problem(check: str, text: str, cure: str) -> Finding:
    return Finding(check=check, level="problem", text=text, cure=cure)


def line(found: Finding) -> str:
    """One finding for a person, its cure below it."""
    text = f"{MARKS[found.level]}  {found.check:<{CHECK_WIDTH}}  {found.text}"
    return f"{text}\n{'':<{CHECK_WIDTH + 9}}  -> {found.cure}" if found.cure else text


def summary(findings: Sequence[Finding]) -> str:
    """How many there are, and the names of the problems."""
    wrong = [found.check for found in findings if found.level == "problem"]
    if not wrong:
        return f"{len(findings)} checks, no problems."
    count = "1 problem" if len(wrong) == 1 else f"{len(wrong)} problems"
    return f"{len(findings)} checks, {count}: {', '.join(dict.fromkeys(wrong))}."


def as_json(findings: Iterable[Finding]) -> dict[str, Any]:
    """For a program: {"problems": 1, "findings": [{check, level, text, cure}]}."""
    rows = [asdict(found) for found in findings]
    return {"problems": sum(row["level"] == "problem" for row in rows), "findings": rows}


def has_problems(findings: Iterable[Finding]) -> bool:
    return any(found.level == "problem" for found in findings)
