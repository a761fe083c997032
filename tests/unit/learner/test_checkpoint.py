"""Checkpoints come back bit by bit; damaged ones are passed over by name."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
from torch import Tensor

from dapo_hpc.learner.checkpoint import LATEST, Checkpoints, NoUsableCheckpoint, Progress
from dapo_hpc.learner.model import Policy
from dapo_hpc.learner.optimizer import AdamSettings, Optimizer
from dapo_hpc.learner.parallel import Processes
from dapo_hpc.weights.source import SafetensorsSource
from tests.learner_parts import make_model

SAVES_FOREVER = """
import sys
from pathlib import Path
from dapo_hpc.learner.parallel import Layout, connect
from dapo_hpc.learner.checkpoint import Checkpoints, Progress
from tests.unit.learner.test_checkpoint import build, disturb

here = connect(Layout(), 0, None)
policy, optimizer = build(Path(sys.argv[1]), here)
checkpoints = Checkpoints(Path(sys.argv[2]), here, keep=2, is_async=sys.argv[3] == "async")
for step in range(1, 10_000):
    disturb(policy, optimizer, step)
    checkpoints.save(policy, optimizer, Progress(step=step))
    print(step, flush=True)
"""


def build(model: Path, here: Processes, *, distributed: bool = False) -> tuple[Policy, Optimizer]:
    policy = Policy(
        model, here, dtype=torch.float32, temperature=1.0, distributed_optimizer=distributed
    )
    policy.load(SafetensorsSource(model))
    settings = AdamSettings(weight_decay=0.1, beta1=0.9, beta2=0.999, eps=1e-8, grad_clip=1.0)
    return policy, Optimizer(policy, settings)


def disturb(policy: Policy, optimizer: Optimizer, seed: int) -> None:
    """An update by random gradients."""
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    for parameter in policy.module.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    optimizer.step(1e-2)


def contents(policy: Policy, optimizer: Optimizer) -> list[Tensor]:
    """Parameters, moments and counts of updates."""
    moments = [moment for shard in optimizer.shards for moment in shard.moments.values()]
    inner = optimizer.megatron.chained_optimizers[0].optimizer
    counts = [state["step"] for state in inner.state.values()]
    counts.append(torch.tensor(optimizer.num_updates))
    return [t.detach().clone() for t in [*policy.module.parameters(), *moments, *counts]]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("num_updates", [0, 3])
def test_round_trip_is_exact(
    num_updates: int, distributed: bool, here: Processes, tmp_path: Path
) -> None:
    make_model(tmp_path / "model", "qwen3", tied=True)
    policy, optimizer = build(tmp_path / "model", here, distributed=distributed)
    for seed in range(num_updates):
        disturb(policy, optimizer, seed)
    checkpoints = Checkpoints(tmp_path / "checkpoints", here, keep=2)
    checkpoints.save(policy, optimizer, Progress(step=3, lineage=2))
    saved = contents(policy, optimizer)
    disturb(policy, optimizer, 99)
    after = contents(policy, optimizer)
    assert not same(saved, after)

    other_policy, other_optimizer = build(tmp_path / "model", here, distributed=distributed)
    progress = checkpoints.load_newest(other_policy, other_optimizer)
    assert progress == Progress(step=3, lineage=2)
    assert same(saved, contents(other_policy, other_optimizer))
    disturb(other_policy, other_optimizer, 99)
    assert same(after, contents(other_policy, other_optimizer)), "training goes on as if unbroken"


def test_skipped_updates_in_a_row_are_counted_on(here: Processes, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    policy, optimizer = build(tmp_path / "model", here)
    disturb(policy, optimizer, 0)
    optimizer.zero_grad()
    next(policy.module.parameters()).main_grad.fill_(torch.inf)
    optimizer.step(1e-2)
    checkpoints = Checkpoints(tmp_path / "checkpoints", here, keep=1)
    checkpoints.save(policy, optimizer, Progress(step=1))
    _, resumed = other = build(tmp_path / "model", here)
    checkpoints.load_newest(*other)
    assert (resumed.num_updates, resumed.num_skipped_in_a_row) == (1, 1)


def test_the_newest_are_kept_and_latest_names_one(here: Processes, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    policy, optimizer = build(tmp_path / "model", here)
    directory = tmp_path / "checkpoints"
    checkpoints = Checkpoints(directory, here, keep=2)
    for step in (1, 2, 5, 6):
        checkpoints.save(policy, optimizer, Progress(step=step))
    assert checkpoints.steps() == [5, 6]
    assert (directory / LATEST).read_text() == "step_000006\n"
    checkpoints.save(policy, optimizer, Progress(step=3))
    assert checkpoints.steps() == [3], "steps after a rollback belong to an abandoned future"
    assert not list(directory.glob(".tmp-*"))


def test_a_damaged_checkpoint_takes_no_place_among_those_that_are_kept(
    here: Processes, tmp_path: Path
) -> None:
    make_model(tmp_path / "model")
    policy, optimizer = build(tmp_path / "model", here)
    directory = tmp_path / "checkpoints"
    checkpoints = Checkpoints(directory, here, keep=2)
    for step in (1, 2):
        checkpoints.save(policy, optimizer, Progress(step=step))
    cut(directory / "step_000002" / "common.pt")
    resumed = Checkpoints(directory, here, keep=2)
    assert resumed.load_newest(policy, optimizer) == Progress(step=1)
    resumed.save(policy, optimizer, Progress(step=3))
    assert resumed.steps() == [1, 3]


def test_no_checkpoint_is_no_error(here: Processes, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    directory = tmp_path / "checkpoints"
    for name in ("step_000002.bak", "step_old", ".tmp-step_000003-0a1b2c3d"):
        (directory / name).mkdir(parents=True)
    checkpoints = Checkpoints(directory, here, keep=1)
    assert checkpoints.load_newest(*build(tmp_path / "model", here)) is None
    assert not (directory / ".tmp-step_000003-0a1b2c3d").exists(), "a kill left it"


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_byte, cut, empty, Path.unlink])
@pytest.mark.parametrize("name", ["__0_0.distcp", "common.pt", ".metadata", "files.json"])
def test_a_damaged_checkpoint_is_passed_over(
    damage: object, name: str, here: Processes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_model(tmp_path / "model")
    policy, optimizer = build(tmp_path / "model", here)
    directory = tmp_path / "checkpoints"
    checkpoints = Checkpoints(directory, here, keep=2)
    checkpoints.save(policy, optimizer, Progress(step=1))
    first = contents(policy, optimizer)
    disturb(policy, optimizer, 0)
    checkpoints.save(policy, optimizer, Progress(step=2))
    damage(directory / "step_000002" / name)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        assert checkpoints.load_newest(policy, optimizer) == Progress(step=1)
    assert "step_000002 is not usable" in caplog.text
    if name != "files.json" or damage is not flip_byte:  # which may spoil another file's digest
        assert name in caplog.text
    assert same(first, contents(policy, optimizer))
    (directory / "step_000001" / "common.pt").unlink()
    with pytest.raises(NoUsableCheckpoint, match="steps 1, 2"):
        checkpoints.load_newest(policy, optimizer)


def test_a_checkpoint_of_another_model_is_refused(here: Processes, tmp_path: Path) -> None:
    make_model(tmp_path / "qwen2")
    make_model(tmp_path / "llama", "llama")
    checkpoints = Checkpoints(tmp_path / "checkpoints", here, keep=2)
    checkpoints.save(*build(tmp_path / "llama", here), Progress(step=1))
    with pytest.raises(NoUsableCheckpoint):
        checkpoints.load_newest(*build(tmp_path / "qwen2", here))


def test_a_save_is_fast(here: Processes, tmp_path: Path) -> None:
    """Megatron's own way starts a new Python process for each learner: 5 s and more."""
    make_model(tmp_path / "model")
    policy, optimizer = build(tmp_path / "model", here)
    checkpoints = Checkpoints(tmp_path / "checkpoints", here, keep=2)
    took = []
    for step in (1, 2, 3):
        began = time.perf_counter()
        checkpoints.save(policy, optimizer, Progress(step=step))
        took.append(time.perf_counter() - began)
    assert min(took) < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_sigkill_at_any_moment_leaves_a_usable_checkpoint(
    mode: str, here: Processes, tmp_path: Path
) -> None:
    make_model(tmp_path / "model")
    directory = tmp_path / "checkpoints"
    process = subprocess.Popen(
        [sys.executable, "-c", SAVES_FOREVER, str(tmp_path / "model"), str(directory), mode],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    time.sleep(0.05)  # into the next save
    process.send_signal(signal.SIGKILL)
    printed = [int(line) for line in process.stdout.read().split()]
    process.wait()
    policy, optimizer = build(tmp_path / "model", here)
    progress = Checkpoints(directory, here, keep=2).load_newest(policy, optimizer)
    assert progress is not None
    # A save beside training has begun when it returns, and the one before it is durable.
    assert progress.step >= max(printed, default=3) - (mode == "async")
    replayed = build(tmp_path / "model", here)
    for step in range(1, progress.step + 1):
        disturb(*replayed, step)
    assert same(contents(*replayed), contents(policy, optimizer))
