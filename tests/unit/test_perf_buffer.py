"""The load on the buffer, for a second: every figure is there, and means something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_short_call_measures_everything(tmp_path: Path) -> None:
    command = [sys.executable, "perf/bench_buffer.py", "--actors", "3", "--rounds", "1"]
    command += ["--seconds", "1.5", "--output", str(tmp_path), "--commit", "abc"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    (document,) = tmp_path.glob("*.json")
    found = json.loads(document.read_text())
    (row,) = found["rows"]
    assert row["actors"] == 3
    for name in ("append", "https", "submit", "submit and read"):
        assert row[f"{name} MB/s"] > 0
    slower = min(row["append MB/s"], row["https MB/s"])
    assert row["share of the slower baseline"] <= row["submit MB/s"] / slower + 0.01
    assert row["heartbeats"] >= 3
    for call in ("lease", "heartbeat", "submit"):
        assert 0 < row[f"{call} p50 ms"] <= row[f"{call} p99 ms"]
    assert row["buffer MiB"] > 20
    assert "3 actors: " in document.with_suffix(".md").read_text()
