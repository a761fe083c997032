"""A whole run as a process that can be hit with real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dapo_hpc.observe import metrics
from dapo_hpc.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "demo.toml"

QUICK: dict[str, object] = {
    "buffer.lease_s": 6,
    "buffer.heartbeat_s": 1,
    "buffer.request_timeout_s": 3,
    "launch.max_restarts": 5,
}
"""Notices a death soon."""
SMALL: dict[str, object] = {
    "run.total_steps": 6,
    "rollout.prompts_per_step": 6,
    "rollout.group_size": 8,
    "rollout.max_response_tokens": 24,
    "learner.mini_batches": 2,
    "learner.checkpoint_every": 2,
    "eval.every": 3,
    "eval.samples": 1,
    **QUICK,
}
"""A run of seconds."""
DEMO_STEPS = 16
DEMO_SCALE: dict[str, object] = {**QUICK, "run.total_steps": DEMO_STEPS}
"""The demo, a little shorter."""
START_AT_MOST = 0.55
END_AT_LEAST = 0.90


def dapo(*words: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dapo_hpc.cli", *words]
    return subprocess.Popen(command, cwd=ROOT, text=True, **options)  # type: ignore[call-overload, no-any-return]


def set_options(values: dict[str, object]) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


@dataclass
class WholeRun:
    """`dapo train` of the demo's files, with its run directory."""

    base: Path
    directory: Path
    process: subprocess.Popen[str] | None = None

    @property
    def run(self) -> RunDir:
        return RunDir(self.directory / "run")

    def paths(self) -> dict[str, object]:
        return {
            "run.dir": self.directory,
            "run.name": "run",
            "model.path": self.base / "base",
            "prompts.train": self.base / "data" / "train.parquet",
            "prompts.eval": self.base / "data" / "heldout.parquet",
        }

    def start(self, scale: dict[str, object] = SMALL, **settings: object) -> None:
        """`settings` as in `run__total_steps=4`."""
        values = {
            **self.paths(),
            **scale,
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        self._launch("train", str(DEMO), *set_options(values))

    def resume(self) -> None:
        self._launch("train", "--resume", str(self.run.root))

    def _launch(self, *words: str) -> None:
        self.log = open(self.directory / "train.log", "a")  # noqa: SIM115 - lives with the process
        self.process = dapo(*words, stdout=self.log, stderr=subprocess.STDOUT)

    def wait(self, limit_s: float = 240.0) -> int:
        assert self.process is not None
        return self.process.wait(timeout=limit_s)

    def output(self) -> str:
        return (self.directory / "train.log").read_text()

    def steps(self) -> list[dict[str, float]]:
        return metrics.read(self.run.metrics, "step")

    def wait_for_step(self, step: int, limit_s: float = 180.0) -> None:
        deadline = time.monotonic() + limit_s
        while not self.has_step(step):
            assert self.process is not None
            assert self.process.poll() is None, f"the run ended early:\n{self.output()[-4000:]}"
            assert time.monotonic() < deadline, f"no step {step}:\n{self.output()[-4000:]}"
            time.sleep(0.1)

    def has_step(self, step: int) -> bool:
        return any(row["step"] >= step for row in self.steps())

    def pids(self, role: str = "") -> list[int]:
        """Live processes of this run, found by their command line; with a role, only those."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            is_ours = str(self.run.root).encode() in words and b"role" in words
            if entry.name.isdigit() and is_ours and (not role or role.encode() in words):
                found.append(int(entry.name))
        return sorted(found)

    def assert_accounts_close(self) -> None:
        """Every response leased and every group dispatched is somewhere, by the last snapshot."""
        status = json.loads(self.run.status.read_text())
        count = Counter(status["counters"])
        ends = ("accepted", "expired", "released", "failed", "crashed", "aborted")
        ended = sum(count[f"responses_{end}"] for end in ends)
        assert count["responses_leased"] == ended + status["leases"]["responses_in_flight"]
        groups = sum(number for name, number in count.items() if name.startswith("train_"))
        assert count["groups_dispatched"] == groups > 0
        assert count["invariant_violations"] == 0

    def kill(self, role: str) -> None:
        """SIGKILL to every process of a role."""
        pids = self.pids(role)
        assert pids, f"there is no {role} to kill:\n{self.output()[-4000:]}"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def kill_everything(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)


def assert_learned(demo: WholeRun) -> None:
    """DEMO_SCALE reached its accuracy, each step trained once, the accounts close."""
    evals = {row["step"]: row["eval/accuracy"] for row in metrics.read(demo.run.metrics, "eval")}
    assert evals[0] < START_AT_MOST
    assert evals[DEMO_STEPS] >= END_AT_LEAST
    rows = demo.steps()
    assert [row["step"] for row in rows] == list(range(1, DEMO_STEPS + 1))
    assert all(row["learner/first_ratio_max_diff"] == 0 for row in rows)
    assert all(row["mismatch/mean_diff"] < 1e-5 for row in rows)
    assert all(row["train/groups"] == 24 for row in rows)
    demo.assert_accounts_close()
