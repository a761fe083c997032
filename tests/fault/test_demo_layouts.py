"""The demo with the learner on two processes, in each way to split it: it learns as on one."""

from __future__ import annotations

import pytest

from tests.fault.whole_run import DEMO_SCALE, WholeRun, assert_learned

pytestmark = pytest.mark.full


@pytest.mark.parametrize("kind", ["tensor", "pipeline", "data"])
def test_the_demo_on_two_ranks(demo_run: WholeRun, kind: str) -> None:
    demo_run.start({**DEMO_SCALE, f"learner.{kind}_parallel": 2})
    demo_run.wait_for_step(1)
    assert len(demo_run.pids("learner")) == 2
    assert demo_run.wait(1200) == 0, demo_run.output()[-4000:]
    assert_learned(demo_run)
