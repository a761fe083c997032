"""Checkpoints beside training, on a disk that is slow, full, or taken away by a kill."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
from safetensors.torch import load_file

from dapo_hpc.learner import train as train_module
from dapo_hpc.learner.checkpoint import (
    LATEST,
    CheckpointNotWritten,
    Checkpoints,
    Progress,
)
from dapo_hpc.learner.checkpoint_writer import ProcessEnds, make_plan, write
from dapo_hpc.learner.parallel import Processes
from dapo_hpc.learner.session import open_session
from dapo_hpc.learner.train import train
from dapo_hpc.run_dir import RunDir
from tests.learner_parts import FakeBuffer, make_config, make_model
from tests.unit.learner.test_checkpoint import build, contents, disturb, same

LIMIT_S = 60.0

STUCK = """
import os, sys, threading
from pathlib import Path
from dapo_hpc.learner.parallel import Layout, connect
from dapo_hpc.learner.checkpoint import Checkpoints, Progress
from dapo_hpc.roles.startup import leave_at_once_when_asked
from tests.unit.learner.test_checkpoint import build, disturb

leave_at_once_when_asked()
here = connect(Layout(), 0, None)
trained = build(Path(sys.argv[1]), here)
checkpoints = Checkpoints(Path(sys.argv[2]), here, keep=2, is_async=sys.argv[3] == "async")
checkpoints.save(*trained, Progress(step=1))
checkpoints.wait()
disturb(*trained, 1)

def stuck(descriptor):
    print("writes", flush=True)
    threading.Event().wait()

os.fsync = stuck
checkpoints.save(*trained, Progress(step=2))
threading.Event().wait()
"""


class Disk:
    """`os.fsync` that waits for `release`, in every thread but the main one."""

    def __init__(self) -> None:
        self.asked, self.released = threading.Event(), threading.Event()
        self._real = os.fsync

    def fsync(self, descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            self.asked.set()
            assert self.released.wait(LIMIT_S)
        self._real(descriptor)


@contextmanager
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk.fsync)
        try:
            yield disk
        finally:
            disk.released.set()


def test_training_goes_on_while_a_slow_disk_writes(
    here: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "model")
    directory = tmp_path / "checkpoints"
    trained = build(tmp_path / "model", here)
    checkpoints = Checkpoints(directory, here, keep=2, is_async=True)
    checkpoints.save(*trained, Progress(step=1))
    checkpoints.wait()
    disturb(*trained, 2)
    with slow_disk(monkeypatch) as disk:
        checkpoints.save(*trained, Progress(step=2))
        saved = contents(*trained)
        assert disk.asked.wait(LIMIT_S)
        for seed in (3, 4):
            disturb(*trained, seed)
        assert checkpoints.steps() == [1]
        assert (directory / LATEST).read_text() == "step_000001\n"
        disk.released.set()
        checkpoints.wait()
    assert checkpoints.steps() == [1, 2]
    assert not same(saved, contents(*trained))
    assert checkpoints.load_newest(*trained) == Progress(step=2)
    assert same(saved, contents(*trained)), "what was there when `save` returned"


def test_a_second_save_waits_for_the_first(
    here: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "model")
    trained = build(tmp_path / "model", here)
    checkpoints = Checkpoints(tmp_path / "checkpoints", here, keep=2, is_async=True)
    with slow_disk(monkeypatch) as disk:
        checkpoints.save(*trained, Progress(step=1))
        assert disk.asked.wait(LIMIT_S)
        threading.Timer(0.2, disk.released.set).start()
        checkpoints.save(*trained, Progress(step=2))
        assert checkpoints.steps()[0] == 1
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_full_disk_is_an_error_that_names_the_checkpoint(
    is_async: bool, here: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "model")
    trained = build(tmp_path / "model", here)
    checkpoints = Checkpoints(tmp_path / "checkpoints", here, keep=2, is_async=is_async)
    checkpoints.save(*trained, Progress(step=1))
    checkpoints.wait()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save() -> None:
        checkpoints.save(*trained, Progress(step=2))
        checkpoints.wait()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointNotWritten, match=r"checkpoint 2 .*No space left on device"):
            save()
    with pytest.raises(CheckpointNotWritten):
        checkpoints.check()
    resumed = Checkpoints(tmp_path / "checkpoints", here, keep=2)
    assert resumed.load_newest(*trained) == Progress(step=1)


@contextmanager
def process(script: str, *words: object) -> Iterator[subprocess.Popen[str]]:
    """A learner that has told that it writes checkpoint 2."""
    started = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, words)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    assert started.stdout is not None
    try:
        assert started.stdout.readline() == "writes\n"
        yield started
    finally:
        started.kill()
        started.communicate()


def require_resumed(model: Path, directory: Path, here: Processes) -> None:
    """A learner that starts now finds checkpoint 1, of the weights before any update."""
    trained = build(model, here)
    start = contents(*trained)
    checkpoints = Checkpoints(directory, here, keep=2)
    assert (directory / LATEST).read_text() == "step_000001\n"
    assert checkpoints.load_newest(*trained) == Progress(step=1)
    assert same(start, contents(*trained))
    assert list(directory.glob(".tmp-*")) == []


@pytest.mark.parametrize(
    ("mode", "number", "code"),
    [
        ("async", signal.SIGKILL, -signal.SIGKILL),
        ("async", signal.SIGTERM, 0),  # well within launch.stop_s, whatever the disk does
        pytest.param("sync", signal.SIGTERM, 0, marks=pytest.mark.full),
    ],
)
def test_a_learner_that_is_stopped_beside_a_write_leaves_the_checkpoint_before_and_no_process(
    mode: str, number: signal.Signals, code: int, here: Processes, tmp_path: Path
) -> None:
    """The disk does not answer."""
    model, directory = tmp_path / "model", tmp_path / "checkpoints"
    make_model(model)
    with process(STUCK, model, directory, mode) as stuck:
        assert list(directory.glob(".tmp-step_000002-*"))
        assert children(stuck.pid) == [], "nobody who would write on"
        stuck.send_signal(number)
        assert stuck.wait(LIMIT_S) == code
    require_resumed(model, directory, here)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in found for child in file.read_text().split()]


def test_writing_ends_when_the_process_does(here: Processes, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    policy, _ = build(tmp_path / "model", here)
    state: dict[str, Any] = {"model": policy.module.sharded_state_dict()}
    (tmp_path / "checkpoint").mkdir()
    plan = make_plan(tmp_path / "checkpoint", state, is_snapshot=False, is_first=True)
    looks = iter(range(5))

    def check() -> None:
        if next(looks, None) is None:
            raise ProcessEnds

    with pytest.raises(ProcessEnds):
        write(plan, check)


# ------------------------------------------------------------------ within a run


def run_once(
    root: Path, here: Processes, buffer: FakeBuffer, *, total_steps: int, **learner: Any
) -> tuple[RunDir, Checkpoints]:
    make_model(root / "model", "qwen3", tied=True)
    run_section = {"total_steps": total_steps}
    config = make_config(root / "model", root, run=run_section, learner=learner)
    config.run_dir.mkdir(parents=True)
    run = RunDir(config.run_dir)
    session = open_session(run, config, here, buffer)
    train(session)
    return run, session.checkpoints


def test_a_run_ends_with_the_same_bits_and_its_last_checkpoint_is_durable(
    here: Processes, tmp_path: Path
) -> None:
    ends = []
    for is_async in (False, True):
        buffer, root = FakeBuffer(), tmp_path / str(is_async)
        run, checkpoints = run_once(
            root, here, buffer, total_steps=4, async_checkpoint=is_async, distributed_optimizer=True
        )
        ends.append(load_file(run.model / "model.safetensors"))
        assert checkpoints.steps() == [3, 4]
        assert buffer.commits[-1] == 3
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_buffer_keeps_its_batches_until_a_checkpoint_is_durable(
    here: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes the checkpoint of step 2 only after step 3 is trained."""
    buffer, real = FakeBuffer(), train_module.rollout_step
    seen: list[list[int]] = []
    with slow_disk(monkeypatch) as disk:

        def watched(session: Any, step: int) -> dict[str, float]:
            figures = real(session, step)
            seen.append(list(buffer.commits))
            if step == 3:
                disk.released.set()
            return figures

        monkeypatch.setattr(train_module, "rollout_step", watched)
        run_once(tmp_path, here, buffer, total_steps=5, async_checkpoint=True, checkpoint_every=2)
        assert disk.asked.is_set()
    assert seen[:3] == [[], [], []]
    assert buffer.commits[0] == 2
    assert buffer.commits[-1] == 4, "the older of the two that are kept"
