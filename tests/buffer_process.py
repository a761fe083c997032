"""The real buffer process on a small run directory, for tests that speak to it over HTTPS."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dapo_hpc import config
from dapo_hpc.buffer.client import BufferClient
from dapo_hpc.buffer.endpoint import read_endpoint
from dapo_hpc.config import RunConfig
from dapo_hpc.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import logging, sys
from pathlib import Path
from dapo_hpc import config
from dapo_hpc.observe.log import exit_with_cause, setup
from dapo_hpc.roles.buffer import main
from dapo_hpc.run_dir import RunDir
setup("buffer")
run = RunDir(Path(sys.argv[1]))
try:
    code = main(run, config.load(run.config))
except Exception as error:
    exit_with_cause(error)
sys.exit(code)
"""


def make_run(directory: Path, *, num_prompts: int = 40, **changes: object) -> RunDir:
    """A run directory with prepared prompts; changes are given as section__key=value."""
    run = RunDir(directory / "run")
    run.train_prompts.parent.mkdir(parents=True)
    for path, count in ((run.train_prompts, num_prompts), (run.eval_prompts, 2)):
        pq.write_table(_prompts(count), path)
    run.config.write_text(config.dump(small_config(**changes)))
    return run


def small_config(**changes: object) -> RunConfig:
    table: dict[str, dict[str, object]] = {
        "run": {"name": "run", "total_steps": 100},
        "model": {"path": "model"},
        "prompts": {"train": "train.parquet", "eval": "eval.parquet"},
        "rollout": {"prompts_per_step": 2, "group_size": 2, "max_sequences": 8},
        "learner": {"mini_batches": 1},
        "eval": {"samples": 2},
        "hardware": {"gpus_per_node": 0},
        "buffer": {"lease_s": 6.0, "heartbeat_s": 0.5, "request_timeout_s": 2.0},
    }
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        table.setdefault(section, {})[key] = value
    return config.parse(table)


def _prompts(count: int) -> pa.Table:
    return pa.table(
        {
            "uid": [f"prompt-{row}" for row in range(count)],
            "token_ids": pa.array(
                [list(range(row + 1)) for row in range(count)], pa.list_(pa.int32())
            ),
            "data_source": ["digits"] * count,
            "ground_truth": [str(row) for row in range(count)],
        }
    )


def client_of(run: RunDir, *, give_up_s: float = 20.0) -> BufferClient:
    return BufferClient(run, request_timeout_s=2.0, give_up_s=give_up_s)


class BufferProcess:
    """`role buffer` of a run; `kill` is SIGKILL."""

    def __init__(self, run: RunDir, prelude: str = "") -> None:
        """`prelude` is Python that the process runs first, for instance to shorten a time."""
        self.run = run
        self.program = prelude + PROGRAM
        self.log = run.root / "buffer.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, is_awaited: bool = True) -> None:
        before = read_endpoint(self.run).incarnation if self.run.endpoint.exists() else 0
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", self.program, str(self.run.root)],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
        if is_awaited:
            self.wait_until_it_serves(before)

    def wait_until_it_serves(self, before: int, limit_s: float = 20.0) -> None:
        deadline = time.monotonic() + limit_s
        while not self.run.endpoint.exists() or read_endpoint(self.run).incarnation <= before:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait(10)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.signal(signal.SIGTERM)
        assert self.process is not None
        return self.process.wait(15)

    def wait(self, limit_s: float = 15.0) -> int:
        assert self.process is not None
        return self.process.wait(limit_s)
