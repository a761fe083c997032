"""What one benchmark process has found so far, on disk after every step.

A process that is killed loses nothing but the round it was in; one that dies leaves the name of
the provider that was running.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .ceilings import Ceilings
from .task import Row


class Record:
    def __init__(self, name: str, header: dict[str, Any], path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, list[Row]] = {}
        self.found: dict[str, Any] = {
            "name": name,
            **header,
            "ended": "not yet",
            "provider": None,
            "tasks": [],
            "rows": [],
        }

    def doing(self, what: str, provider: str) -> None:
        """Said before, for whoever finds the file of a dead process."""
        self.found["ended"], self.found["provider"] = f"while {what}", provider
        self._write()

    def set_rows(self, task: str, rows: list[Row]) -> None:
        """All rows of a task as far as they are known."""
        self.rows[task] = rows
        self.found["rows"] = [row for of_task in self.rows.values() for row in of_task]
        self._write()

    def finish(self, task: str, ceilings: Ceilings, clocks: dict[str, str], seconds: float) -> None:
        entry = {"task": task, **ceilings.figures(), "clocks": clocks, "seconds": seconds}
        self.found["tasks"].append(entry)
        self._write()
        print(f"{task}: {seconds:.1f} s", flush=True)

    def skip(self, task: str, reason: str) -> None:
        self.found["tasks"].append({"task": task, "skipped": reason})
        self.found["provider"] = None
        self._write()
        print(f"{task}: left out, {reason}", flush=True)

    def end(self, how: str) -> None:
        self.found["ended"], self.found["provider"] = how, None
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            write_text(self.path, json.dumps(self.found, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all: whoever reads meanwhile sees the file before or after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text)
    os.replace(beside, path)
