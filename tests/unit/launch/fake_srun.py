"""A FakeSrun for the supervisor's tests, since a real one needs a cluster.

What it imitates was seen with Slurm 22.05: it hands SIGUSR2 on, kills its tasks at SIGTERM, ends
all when one ends badly, and exits with the highest code, where death by signal N counts 128 + N.

Run as the command: `srun OPTIONS WORDS`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def install(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it the `srun` of this process."""
    directory.mkdir(exist_ok=True)
    script = directory / "srun"
    script.write_text(f'#!/bin/bash\nexec {sys.executable} {__file__} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def main(words: list[str]) -> int:
    number = next(i for i, word in enumerate(words) if not word.startswith("--"))
    options = dict(word[2:].partition("=")[::2] for word in words[:number])
    tasks = [
        _start(words[number:], options, rank, int(options["ntasks"]))
        for rank in range(int(options["ntasks"]))
    ]
    for received, sent in ((signal.SIGUSR2, signal.SIGUSR2), (signal.SIGTERM, signal.SIGKILL)):
        signal.signal(received, lambda *_, sent=sent: [t.send_signal(sent) for t in tasks])
    while any(task.poll() is None for task in tasks):
        if any(task.poll() for task in tasks):
            for task in tasks:
                task.terminate()
        time.sleep(0.01)
    return max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks)


def _start(words: list[str], options: dict[str, str], rank: int, world: int) -> subprocess.Popen:
    environment = os.environ | {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NTASKS": str(world),
        "FAKE_SRUN_OPTIONS": " ".join(f"--{k}={v}" if v else f"--{k}" for k, v in options.items()),
    }
    with open(options["output"].replace("%t", str(rank)), "ab") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, env=environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
