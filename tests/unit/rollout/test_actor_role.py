"""`role prompts`, `role buffer` and `role actor` as real processes; the test is their learner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published import publish_model
from reference import reference_logprobs

from dapo_hpc.buffer.auth import create_auth
from dapo_hpc.buffer.client import BufferClient
from dapo_hpc.config import RunConfig, dump
from dapo_hpc.observe.final import IDLE_EXIT
from dapo_hpc.records import Group, GroupSummary, PolicyVersion
from dapo_hpc.run_dir import RunDir

pytest.importorskip("vllm", reason="needs vLLM")

ROOT = Path(__file__).parents[3]
LIMIT_S = 150.0
TOLERANCE = 1e-4
SCORER = "def is_even(text, ground_truth):\n    return len(text) % 2 == 0\n"

StartRole = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def config(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> RunConfig:
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"{i % 10}+{i // 10}="}],
            "reward_model": {"ground_truth": "0"},
        }
        for i in range(60)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    return tiny_config(
        run={"name": "run", "dir": str(tmp_path), "total_steps": 2},
        prompts={"train": str(tmp_path / "train.parquet"), "max_tokens": 20},
        rollout={"prompts_per_step": 6, "group_size": 4, "max_response_tokens": 200},
        reward={"scorer": "scorer_under_test:is_even"},
        buffer={"lease_s": 10.0, "heartbeat_s": 0.5, "request_timeout_s": 3.0},
        learner={"mini_batches": 2},
    )


@pytest.fixture
def run(config: RunConfig, tmp_path: Path) -> RunDir:
    (tmp_path / "scorer_under_test.py").write_text(SCORER)
    run = RunDir(config.run_dir)
    run.weights.mkdir(parents=True)
    run.logs.mkdir()
    run.config.write_text(dump(config))
    return run


@pytest.fixture
def start_role(run: RunDir, tmp_path: Path) -> Iterator[StartRole]:
    """start_role("actor"): the process; killed when the test ends."""
    path = [str(tmp_path), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    processes: list[subprocess.Popen[str]] = []

    def start(role: str, *arguments: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "dapo_hpc.cli", "role", role, "--run", str(run.root)]
        log = open(run.logs / f"{role}.log", "w")  # noqa: SIM115 - the process writes to it
        processes.append(
            subprocess.Popen([*words, *arguments], stdout=log, stderr=log, env=environment)
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def take(buffer: BufferClient, lineage: int, step: int) -> list[GroupSummary]:
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        reply = buffer.take(lineage, step, 2.0)
        if reply.groups is not None:
            return reply.groups
    raise AssertionError(f"the batch of step {step} did not close in {LIMIT_S} s")


def assert_groups_are_of(groups: list[Group], version: PolicyVersion, model: Path) -> None:
    for group in groups:
        assert 0 < sum(r.is_correct for r in group.responses) < 4
        for response in group.responses:
            assert {span.version for span in response.spans} == {version}
            prompt, token_ids = group.prompt.token_ids.tolist(), response.token_ids.tolist()
            truth = reference_logprobs(model, prompt, token_ids)
            assert np.abs(response.rollout_logprobs - truth).max() < TOLERANCE


@pytest.mark.slow
def test_two_steps_of_a_run_then_a_drain(
    run: RunDir, start_role: StartRole, tiny_model: Path, other_model: Path
) -> None:
    assert start_role("prompts").wait(LIMIT_S) == 0
    start_role("buffer")
    actor = start_role("actor", "--index", "0")
    buffer = BufferClient(run, request_timeout_s=3.0, give_up_s=LIMIT_S)
    lineage = buffer.register(0)
    batches: list[list[Group]] = []
    for step, model in ((0, tiny_model), (1, other_model)):
        version = PolicyVersion(step=step, lineage=lineage)
        publish_model(run.weights, version, model)
        buffer.publish(version, is_evaluated=False)
        batches.append(buffer.fetch([g.group_id for g in take(buffer, lineage, step + 1)]))
        assert len(batches[-1]) == 6
        assert_groups_are_of(batches[-1], version, model)
    first, second = ({group.prompt.uid for group in batch} for batch in batches)
    assert not first & second

    actor.send_signal(signal.SIGINT)
    actor.send_signal(signal.SIGTERM)
    assert actor.wait(30) == 0, (run.logs / "actor.log").read_text()
    assert "drained" in (run.logs / "actor.log").read_text().splitlines()[-1]
    status = buffer.status()
    assert status["counters"]["invariant_violations"] == 0
    assert status["leases"]["live"] == 0
    buffer.close()


@pytest.mark.slow
def test_the_signal_of_a_slurm_step_drains_actor_and_buffer(
    run: RunDir, start_role: StartRole
) -> None:
    assert start_role("prompts").wait(LIMIT_S) == 0
    buffer = start_role("buffer")
    actor = start_role("actor", "--index", "1")
    client = BufferClient(run, request_timeout_s=3.0, give_up_s=LIMIT_S)
    deadline_s = time.monotonic() + LIMIT_S
    while not any(name.startswith("actor-1-") for name in client.status()["actors"]):
        assert time.monotonic() < deadline_s, (run.logs / "actor.log").read_text()
        time.sleep(0.2)
    for process, log in ((actor, "actor.log"), (buffer, "buffer.log")):
        process.send_signal(signal.SIGUSR2)
        assert process.wait(30) == 0, (run.logs / log).read_text()
    client.close()


@pytest.mark.full
def test_an_actor_without_a_buffer_gives_its_place_back(run: RunDir, start_role: StartRole) -> None:
    create_auth(run)
    actor = start_role("actor", "--index", "2", "--idle-exit-s", "1")
    assert actor.wait(LIMIT_S) == IDLE_EXIT, (run.logs / "actor.log").read_text()
