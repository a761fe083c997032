"""A learner that is killed again and again ends where one ends that never was, bit by bit.

A real buffer feeds the first; its ledger must give every batch again as it was. The tape of what it
gave feeds the second, and learners that resume in another layout.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
from safetensors.torch import load_file

from dapo_hpc.buffer import auth
from dapo_hpc.buffer.endpoint import read_endpoint
from dapo_hpc.learner import checkpoint_files
from dapo_hpc.learner.parallel import Layout
from dapo_hpc.observe import metrics
from tests.buffer_process import BufferProcess, client_of, make_run
from tests.fault import learner_lives as lives
from tests.fault.learner_lives import Actor, Life

SEED = 20
STEP_S = 1.0
"""A kill comes at a random time within so long of a batch's arrival."""
MARGIN = 4
"""Steps beyond one for each kill: a life ends before it has finished two."""
WRITE_S = 0.1
"""The same of the beginning of a checkpoint's writing."""
SAME = ("learner/loss", "learner/grad_norm", "learner/entropy", "learner/tokens", "learner/lr")
TOLERANCE = 5e-5
"""In another layout, of the largest entry of each tensor: what tests/multiproc allows, with its
reasons, after sixteen updates of such a model."""


@dataclass(frozen=True)
class Kill:
    """What it left."""

    newest: int
    """Step of the newest checkpoint; 0: none."""
    is_inside_a_write: bool
    """A newer one was half written."""


@dataclass(frozen=True)
class Story:
    """What happened."""

    killed: Life
    whole: Life
    """Never killed, fed by the tape."""
    middle: Path
    """Checkpoints after half of the kills."""
    kills: list[Kill]
    status: dict[str, dict[str, int]]


def tell(root: Path, num_kills: int) -> Story:
    """Kill, let it finish, and train again without kills."""
    tape = root / "tape"
    tape.mkdir()
    life = Life(root / "killed", num_kills + MARGIN, tape, is_fed_by_buffer=True)
    life.make()
    buffer, actor = BufferProcess(life.run), Actor(life.run)
    buffer.start()
    actor.start()
    try:
        kills = [one_kill(life, number) for number in range(num_kills)]
        life.run_to_the_end()
        actor.join(30)
        assert buffer.stop() == 0
    finally:
        actor.stopped.set()
        buffer.kill()
    whole = Life(root / "whole", life.total_steps, tape)
    whole.make()
    whole.run_to_the_end()
    status = json.loads(life.run.status.read_text())
    return Story(life, whole, life.root / "middle", kills, status)


def one_kill(life: Life, number: int) -> Kill:
    """Odd ones hit the writing of a checkpoint, even ones anything."""
    draw = random.Random(SEED + number)
    taken = lives.num_taken(life)
    ranks = replace(life, is_async=number % 4 >= 2).start()

    def has_work() -> bool:
        return lives.num_taken(life) > taken and lives.has_taken(life, number + 1)

    try:
        lives.wait_until(has_work, ranks, life)
        if number % 2:
            lives.wait_until(lambda: lives.half_written(life.run), ranks, life)
            time.sleep(draw.uniform(0, WRITE_S))
        else:
            until, taken = time.monotonic() + draw.uniform(0, STEP_S), lives.num_taken(life)
            lives.wait_until(
                lambda: time.monotonic() > until or lives.num_taken(life) > taken, ranks, life
            )
    finally:
        lives.kill(ranks)
    if number == (life.total_steps - MARGIN) // 2:
        assert checkpoint_files.steps_in(life.run.checkpoints)
        shutil.copytree(life.run.checkpoints, life.root / "middle")
    newest = max(checkpoint_files.steps_in(life.run.checkpoints), default=0)
    return Kill(newest, bool(lives.half_written(life.run)))


def resume_elsewhere(story: Story, name: str, layout: Layout, *, is_wrong: bool = False) -> Life:
    """Train on from the middle, fed by the tape, in another layout; perhaps with a wrong batch."""
    root = story.killed.root.parent / name
    tape = story.killed.tape
    total = story.killed.total_steps
    if is_wrong:
        tape = root.with_suffix(".tape")
        shutil.copytree(story.killed.tape, tape)
        shutil.copy(tape / f"step_{total - 1}", tape / f"step_{total}")
    life = Life(root, total, tape, layout=layout)
    life.make()
    shutil.copytree(story.middle, life.run.checkpoints)
    life.run_to_the_end()
    return life


# ------------------------------------------------------------------ the comparison


def tensors(life: Life) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(life.run.model / "model.safetensors")
    return found


def digest(path: Path) -> str:
    """Short, because pytest explains a difference of megabytes for minutes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensor_files(life: Life) -> dict[str, str]:
    """Name -> digest: parameters and moments at the end."""
    last = checkpoint_files.directory_of(life.run.checkpoints, life.total_steps)
    return {path.name: digest(path) for path in last.glob("*.distcp")}


def difference(one: Life, other: Life) -> float:
    """Largest, within each tensor as a share of its largest entry."""
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    return max(float((mine[n] - t).abs().max() / t.abs().max()) for n, t in theirs.items())


def figures(life: Life) -> list[list[float]]:
    rows = metrics.read(life.run.metrics, "step")
    assert [row["step"] for row in rows] == list(range(1, life.total_steps + 1))
    return [[row[name] for name in SAME] for row in rows]


def check_bitwise(killed: Life, whole: Life) -> None:
    mine, theirs = (digest(life.run.model / "model.safetensors") for life in (killed, whole))
    assert mine == theirs, "the model"
    assert tensor_files(killed) == tensor_files(whole) != {}, "parameters and moments"
    assert figures(killed) == figures(whole), "the figures of every step"


def check_story(story: Story, num_kills: int) -> None:
    events = story.killed.events.read_text().split("\n")
    starts = [int(event.split()[1]) for event in events if event.startswith("register")]
    assert len(story.kills) == num_kills
    assert starts == [0, *(kill.newest for kill in story.kills)], "none goes further back"
    assert any(event.startswith("replayed step") for event in events), "a batch came twice"
    assert sum(kill.is_inside_a_write for kill in story.kills) >= num_kills // 3
    assert story.status["counters"].get("invariant_violations", 0) == 0
    check_bitwise(story.killed, story.whole)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return tell(tmp_path_factory.mktemp("lives"), 3)


@pytest.mark.slow
def test_killed_three_times_it_ends_bit_by_bit_as_if_it_never_was(story: Story) -> None:
    check_story(story, 3)


@pytest.mark.slow
def test_it_resumes_in_another_layout(story: Story) -> None:
    life = resume_elsewhere(story, "tensor", Layout(tensor=2))
    assert difference(life, story.whole) < TOLERANCE


@pytest.mark.slow
def test_one_wrong_batch_at_the_end_does_not_pass(story: Story) -> None:
    """Negative control of both comparisons."""
    life = resume_elsewhere(story, "wrong", Layout(), is_wrong=True)
    assert difference(life, story.whole) > TOLERANCE
    with pytest.raises(AssertionError, match="the model"):
        check_bitwise(life, story.whole)


@pytest.mark.full
def test_killed_twenty_times(tmp_path: Path) -> None:
    story = tell(tmp_path, 20)
    check_story(story, 20)
    for name, layout in (
        ("tensor", Layout(tensor=2)),
        ("pipeline", Layout(pipeline=2)),
        ("data", Layout(data=2)),
    ):
        life = resume_elsewhere(story, name, layout)
        assert difference(life, story.whole) < TOLERANCE, name


def test_a_caller_killed_in_the_middle_of_a_request_does_not_end_the_buffer(
    tmp_path: Path,
) -> None:
    """Its head arrived, its body never will."""
    run = make_run(tmp_path)
    process = BufferProcess(run)
    process.start()
    try:
        address = urlsplit(read_endpoint(run).urls()[0])
        head = f"POST /v1/fetch HTTP/1.1\r\nHost: buffer\r\nAuthorization: Bearer {auth.token(run)}"
        with (
            socket.create_connection((address.hostname, address.port)) as plain,
            auth.client_context(run).wrap_socket(plain, server_hostname=auth.SERVER_NAME) as secret,
        ):
            secret.sendall(f"{head}\r\nContent-Length: 100\r\n\r\nhalf".encode())
            time.sleep(0.2)  # the buffer reads the head before the connection is gone
        time.sleep(0.2)
        assert client_of(run, give_up_s=2).register(0) == 1
        assert process.stop() == 0, process.log.read_text()[-2000:]
    finally:
        process.kill()
