"""A learner that is asked to leave finishes its step and writes a checkpoint of it; the next start
trains the batches that it would have trained, to the same bits."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from dapo_hpc.learner import checkpoint_files
from dapo_hpc.learner.parallel import Layout
from dapo_hpc.observe import metrics
from tests.buffer_process import BufferProcess
from tests.fault import learner_lives as lives
from tests.fault.learner_lives import Actor, Life
from tests.fault.test_learner_kill_points import check_bitwise, figures

STEPS = 7
LEAVES_WITHIN_S = 20.0

pytestmark = pytest.mark.slow


@dataclass
class Fed:
    """A learner with a real buffer and an actor."""

    life: Life
    buffer: BufferProcess
    actor: Actor

    def ask_to_leave(self, ranks: list) -> None:  # type: ignore[type-arg]
        for rank in ranks:
            os.kill(rank.pid, signal.SIGUSR2)
        for rank in ranks:
            rank.join(LEAVES_WITHIN_S)
            assert rank.exitcode == 0, self.life.log()

    def finished(self) -> int:
        return metrics.newest_step(self.life.run.metrics, "step")

    def checkpoints(self) -> list[int]:
        return checkpoint_files.steps_in(self.life.run.checkpoints)


def feed(root: Path, layout: Layout) -> Fed:
    tape = root / "tape"
    tape.mkdir()
    life = Life(
        root / "left", STEPS, tape, is_fed_by_buffer=True, layout=layout, checkpoint_every=100
    )
    life.make()
    buffer, actor = BufferProcess(life.run), Actor(life.run)
    buffer.start()
    actor.start()
    return Fed(life, buffer, actor)


@pytest.fixture
def fed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fed]:
    found = feed(tmp_path, getattr(request, "param", Layout()))
    yield found
    found.actor.stopped.set()
    found.buffer.kill()


@pytest.mark.parametrize(
    "fed",
    [
        Layout(),
        Layout(tensor=2),  # all ranks leave together
        pytest.param(Layout(pipeline=2), marks=pytest.mark.full),  # the last is not rank 0
    ],
    indirect=True,
    ids=str,
)
def test_asked_twice_within_a_step_it_ends_with_the_same_bits(fed: Fed, tmp_path: Path) -> None:
    for step in (2, 4):
        ranks = fed.life.start()
        lives.wait_until(lambda step=step: lives.has_taken(fed.life, step), ranks, fed.life)
        fed.ask_to_leave(ranks)
        assert fed.finished() >= step, "the step under way was finished"
        assert fed.checkpoints()[-1] == fed.finished()
    fed.life.run_to_the_end()
    starts = [e for e in fed.life.events.read_text().split("\n") if e.startswith("register")]
    assert len(starts) == 3
    taken = [e for e in fed.life.events.read_text().split("\n") if e.startswith("take ")]
    assert taken == [f"take {step}" for step in range(1, STEPS + 1)], "no step was trained twice"

    whole = Life(tmp_path / "whole", STEPS, fed.life.tape, layout=fed.life.layout)
    whole.make()
    whole.run_to_the_end()
    assert figures(fed.life) == figures(whole)
    check_bitwise(fed.life, whole)


def test_waiting_for_a_batch_it_leaves_at_once(fed: Fed) -> None:
    ranks = fed.life.start()
    lives.wait_until(lambda: fed.finished() >= 1, ranks, fed.life)
    fed.actor.stopped.set()
    fed.actor.join(10)
    newest = -1
    while newest != fed.finished():  # until the batches that are there are trained
        newest = fed.finished()
        time.sleep(2.0)
    began_s = time.monotonic()
    fed.ask_to_leave(ranks)
    assert time.monotonic() - began_s < 10
    assert fed.checkpoints()[-1] == newest
    assert newest < STEPS


def test_before_the_first_step_there_is_nothing_to_write(fed: Fed) -> None:
    fed.actor.stopped.set()
    fed.actor.join(10)
    shutil.rmtree(fed.life.run.checkpoints, ignore_errors=True)
    ranks = fed.life.start()
    lives.wait_until(
        lambda: fed.life.events.exists() and "register" in fed.life.events.read_text(),
        ranks,
        fed.life,
    )
    fed.ask_to_leave(ranks)
    assert fed.checkpoints() == []
