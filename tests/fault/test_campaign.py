"""Real kills over a real buffer, judged from outside; and a judge that sees what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.campaign.checker import Promise, judge
from tests.fault.whole_run import ROOT

pytestmark = pytest.mark.slow

PROMISE = Promise(group_size=4, batch_groups=16, max_staleness=4)
Notes = list[dict[str, Any]]

REDRAWN = """
from dapo_hpc.buffer import grants
from dapo_hpc.records import PartialResponse
import numpy as np
def forget(desk, group, indices):
    group.drop_partials()
    nothing = dict(token_ids=np.zeros(0, np.int32), rollout_logprobs=np.zeros(0, np.float32))
    return tuple(PartialResponse(index=index, spans=(), **nothing) for index in indices)
grants._known = forget
"""
"""A killed actor's responses are sampled anew."""
EARLY = """
from dataclasses import replace
from dapo_hpc.buffer import writer
writer.GATHER_S = 0.5
put = writer.Writer.put
def answer_first(self, job):
    if job.payloads:
        job.done()
        job = replace(job, done=lambda: None)
    put(self, job)
writer.Writer.put = answer_first
"""
"""The answer to a submit leaves before anything of it is on disk."""


def campaign(directory: Path, kills: int, groups: int, *words: str) -> dict[str, Any]:
    out = directory / "card.json"
    command = [sys.executable, "-m", "tests.campaign.run", "--directory", str(directory)]
    command += ["--batch", str(PROMISE.batch_groups), "--actors", "4", "--out", str(out)]
    command += ["--kills", str(kills), "--groups", str(groups), *words]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=560)
    assert out.exists(), done.stdout[-2000:] + done.stderr[-4000:]
    card: dict[str, Any] = json.loads(out.read_text())
    assert (done.returncode == 0) == (card["faults"] == 0)
    return card


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("campaign")
    return directory / "run", campaign(directory, 12, 800, "--seed", "3")


def test_nothing_is_lost_and_nothing_comes_twice(small: tuple[Path, dict[str, Any]]) -> None:
    _, card = small
    assert card["faults"] == 0
    assert card["SIGKILLs"] >= 12
    assert card["groups trained"] >= 800
    assert card["responses continued by another lease"] > 0


def _of_step(notes: Notes, step: int) -> dict[str, Any]:
    return next(note for note in notes if note["kind"] == "trained" and note["step"] == step)


def _twice(notes: Notes) -> None:
    _of_step(notes, 5)["groups"][0] = _of_step(notes, 2)["groups"][0]


def _altered(notes: Notes) -> None:
    for group in _of_step(notes, 4)["groups"]:
        for one in group["responses"]:
            one["tokens"][-1] ^= 1


def _stale(notes: Notes) -> None:
    _of_step(notes, 9)["groups"][3]["responses"][1]["steps"][0] = 2


def _uniform(notes: Notes) -> None:
    for one in _of_step(notes, 6)["groups"][1]["responses"]:
        one["is_correct"] = True


def _lost(notes: Notes) -> None:
    del _of_step(notes, 6)["groups"][0]


def _other_batch(notes: Notes) -> None:
    again = json.loads(json.dumps(_of_step(notes, 7)))
    again["groups"].reverse()
    notes.append(again)


def _short(notes: Notes) -> None:
    _of_step(notes, 8)["groups"][2]["responses"].pop()


@pytest.mark.parametrize(
    ("fault", "damage"),
    [
        ("trained twice", _twice),
        ("altered", _altered),
        ("stale", _stale),
        ("uniform", _uniform),
        ("lost", _lost),
        ("not replayed", _other_batch),
        ("incomplete", _short),
    ],
)
def test_the_judge_sees(
    small: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    fault: str,
    damage: Callable[[Notes], None],
) -> None:
    """Negative control: one thing of the trainers' notes is changed."""
    shutil.copytree(small[0], tmp_path / "run")
    paths = sorted((tmp_path / "run" / "history").glob("trainer-*.jsonl"))
    notes = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    assert not judge(tmp_path / "run", PROMISE).faults
    damage(notes)
    for path in paths:
        path.unlink()
    paths[0].write_text("".join(json.dumps(note) + "\n" for note in notes))
    assert fault in judge(tmp_path / "run", PROMISE).faults


@pytest.mark.full
def test_a_planted_redraw_is_found(tmp_path: Path) -> None:
    assert campaign(tmp_path, 60, 1500, "--prelude", REDRAWN)["FAULT redrawn"] > 0


@pytest.mark.full
def test_a_planted_early_answer_is_found(tmp_path: Path) -> None:
    """Before the judge can speak, a client already holds more than the buffer remembers."""
    with pytest.raises(AssertionError, match=r"cannot be taken|only \d+ are stored"):
        campaign(tmp_path, 60, 1500, "--prelude", EARLY)


@pytest.mark.full
def test_two_hundred_kills(tmp_path: Path) -> None:
    card = campaign(tmp_path, 200, 8000, "--seed", "4")
    assert card["faults"] == 0
    assert card["SIGKILLs"] >= 200
    assert card["steps replayed"] > 0
    for role in ("actor", "buffer", "trainer"):
        assert card[f"SIGKILLs of {role}"] > 0
    lengths = card["mean tokens trained"], card["mean tokens of informative groups"]
    assert abs(lengths[0] / lengths[1] - 1) < 0.02
