"""The demo itself, hit with SIGKILL: it learns as if nothing had happened."""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from typing import Any

import pytest

from tests.fault.whole_run import DEMO_SCALE, DEMO_STEPS, WholeRun, assert_learned

pytestmark = pytest.mark.full

OF_THE_BATCH = (
    "train/accuracy",
    "train/reward_mean",
    "train/response_tokens_mean",
    "train/response_tokens_max",
    "learner/tokens",
    "learner/entropy",
    "learner/loss",
    "learner/grad_norm",
)
"""They follow from the batch and the checkpoint alone."""
PAUSE_S = 4.0
"""At most, from a step done to the next kill: a step takes about two seconds."""


def figures_by_step(demo: WholeRun) -> dict[int, list[tuple[float, ...]]]:
    """What each lineage that trained a step wrote of its batch."""
    found = defaultdict(list)
    rows: list[dict[str, Any]] = [json.loads(x) for x in demo.run.metrics.read_text().splitlines()]
    for row in rows:
        if row["kind"] == "step":
            found[row["step"]].append(tuple(row[name] for name in OF_THE_BATCH))
    return dict(found)


def assert_replayed(demo: WholeRun) -> None:
    """At least one step was trained again, on the identical batch; two steps never look alike."""
    steps = figures_by_step(demo)
    assert any(len(figures) > 1 for figures in steps.values())
    for step, figures in steps.items():
        assert len(set(figures)) == 1, f"step {step}"
    assert len({figures[0] for figures in steps.values()}) == len(steps)


def test_the_demo_with_one_kill_of_each_role(demo_run: WholeRun) -> None:
    demo_run.start(DEMO_SCALE)
    demo_run.wait_for_step(3)
    demo_run.kill("actor")
    demo_run.wait_for_step(6)
    demo_run.kill("learner")
    demo_run.wait_for_step(9)
    demo_run.kill("buffer")
    assert demo_run.wait(600) == 0, demo_run.output()[-4000:]
    assert_learned(demo_run)
    assert_replayed(demo_run)


def test_the_demo_with_everything_killed(demo_run: WholeRun) -> None:
    demo_run.start(DEMO_SCALE)
    demo_run.wait_for_step(7)
    demo_run.kill_everything()
    time.sleep(0.5)
    assert demo_run.pids() == []
    demo_run.resume()
    assert demo_run.wait(600) == 0, demo_run.output()[-4000:]
    assert_learned(demo_run)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_demo_with_random_kills_throughout(demo_run: WholeRun, seed: int) -> None:
    draw = random.Random(seed)
    demo_run.start(DEMO_SCALE)
    kills = []
    for step in range(1, DEMO_STEPS):
        demo_run.wait_for_step(step, 300)
        time.sleep(draw.uniform(0, PAUSE_S))
        role = draw.choice(("actor", "learner", "buffer"))
        if demo_run.pids(role):
            demo_run.kill(role)
            kills.append(role)
    assert demo_run.wait(600) == 0, demo_run.output()[-4000:]
    assert {"actor", "learner", "buffer"} <= set(kills)
    assert_learned(demo_run)
    assert_replayed(demo_run)
