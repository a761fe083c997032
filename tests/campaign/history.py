"""What a process writes down, one JSON object a line. It outlives its writer's SIGKILL."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class History:
    """Append-only. A line reaches the kernel in one write before the next thing is done."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, kind: str, **values: Any) -> None:
        line = json.dumps({"kind": kind, "at_s": time.monotonic(), **values}) + "\n"
        os.write(self._descriptor, line.encode())


def read(directory: Path, pattern: str) -> Iterator[dict[str, Any]]:
    """All lines of all lives, file by file. The last line of a killed one may be torn."""
    for path in sorted(directory.glob(pattern)):
        for line in path.read_text().split("\n"):
            if line:
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    assert not line.endswith("}"), f"{path}: {line[:100]}"
