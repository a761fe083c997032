"""The demo itself, hit with SIGKILL: it learns as if nothing had happened."""

from __future__ import annotations

import time

import pytest

from dapo_hpc.observe import metrics
from tests.fault.whole_run import QUICK, WholeRun

pytestmark = pytest.mark.full

STEPS = 16
SCALE: dict[str, object] = {**QUICK, "run.total_steps": STEPS}
START_AT_MOST = 0.55
END_AT_LEAST = 0.90


def assert_learned(demo: WholeRun) -> None:
    evals = {row["step"]: row["eval/accuracy"] for row in metrics.read(demo.run.metrics, "eval")}
    assert evals[0] < START_AT_MOST
    assert evals[STEPS] >= END_AT_LEAST
    rows = demo.steps()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["learner/first_ratio_max_diff"] == 0 for row in rows)
    assert all(row["mismatch/mean_diff"] < 1e-5 for row in rows)
    assert all(row["train/groups"] == 24 for row in rows)
    demo.assert_accounts_close()


def test_the_demo_with_one_kill_of_each_role(demo_run: WholeRun) -> None:
    demo_run.start(SCALE)
    demo_run.wait_for_step(3)
    demo_run.kill("actor")
    demo_run.wait_for_step(6)
    demo_run.kill("learner")
    demo_run.wait_for_step(9)
    demo_run.kill("buffer")
    assert demo_run.wait(600) == 0, demo_run.output()[-4000:]
    assert_learned(demo_run)


def test_the_demo_with_everything_killed(demo_run: WholeRun) -> None:
    demo_run.start(SCALE)
    demo_run.wait_for_step(7)
    demo_run.kill_everything()
    time.sleep(0.5)
    assert demo_run.pids() == []
    demo_run.resume()
    assert demo_run.wait(600) == 0, demo_run.output()[-4000:]
    assert_learned(demo_run)
