"""A run directory with its buffer process, and a learner that only takes and commits."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dapo_hpc import config
from dapo_hpc.buffer import auth
from dapo_hpc.buffer.client import BufferClient
from dapo_hpc.records import PolicyVersion
from dapo_hpc.run_dir import RunDir

GROUP_SIZE = 16
PROMPTS_PER_STEP = 16
NUM_PROMPTS = 10_000
START_S = 30.0


def make_run(directory: Path, num_actors: int) -> RunDir:
    """A run of the published group size, with an evaluation unit for each actor that beats."""
    run = RunDir(directory / "run")
    run.train_prompts.parent.mkdir(parents=True)
    for path, count in ((run.train_prompts, NUM_PROMPTS), (run.eval_prompts, num_actors)):
        table = pa.table(
            {
                "uid": [f"prompt-{row}" for row in range(count)],
                "token_ids": pa.array([list(range(200))] * count, pa.list_(pa.int32())),
                "data_source": ["bench"] * count,
                "ground_truth": ["34"] * count,
            }
        )
        pq.write_table(table, path)
    found = config.parse(
        {
            "run": {"name": "run", "total_steps": 10**6},
            "model": {"path": "model"},
            "prompts": {"train": "train.parquet", "eval": "eval.parquet"},
            "rollout": {"prompts_per_step": PROMPTS_PER_STEP, "group_size": GROUP_SIZE},
            "learner": {"mini_batches": 1},
            "eval": {"samples": GROUP_SIZE},
            "buffer": {"max_staleness": 4},
        }
    )
    run.config.write_text(config.dump(found))
    auth.create_auth(run)
    return run


class Served:
    """The buffer process of a run."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        command = [sys.executable, "-m", "dapo_hpc.cli", "role", "buffer", "--run", str(run.root)]
        self.log = run.root / "buffer.log"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        until = time.monotonic() + START_S
        while not run.endpoint.exists():
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the buffer did not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.05)

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self) -> float:
        """Largest so far, resident."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Trainer(threading.Thread):
    """Takes every batch; reads its payload while `is_reading`."""

    def __init__(self, run: RunDir) -> None:
        super().__init__(daemon=True)
        self._client = BufferClient(run, request_timeout_s=30.0)
        self._lineage = self._client.register(0)
        self._client.publish(PolicyVersion(step=0, lineage=self._lineage), is_evaluated=True)
        self.is_reading = False
        self.is_over = False
        self.groups_read = 0

    def run(self) -> None:
        step = 1
        while not self.is_over:
            groups = self._client.take(self._lineage, step, 0.5).groups
            if groups is None:
                continue
            if self.is_reading:
                self.groups_read += len(self._client.fetch([group.group_id for group in groups]))
            self._client.publish(
                PolicyVersion(step=step, lineage=self._lineage), is_evaluated=False
            )
            self._client.commit(self._lineage, step)
            step += 1
