"""A whole run, real parts only, hit with SIGKILL; afterwards the accounting closes."""

from __future__ import annotations

import signal
import time

from tests.fault.whole_run import WholeRun


def assert_complete(whole: WholeRun, total_steps: int = 6) -> None:
    rows = whole.steps()
    assert [row["step"] for row in rows] == list(range(1, total_steps + 1))
    for row in rows:
        assert row["train/groups"] == 6
        assert row["learner/first_ratio_max_diff"] == 0
        assert row["mismatch/mean_diff"] < 1e-4
        assert row["buffer/invariant_violations"] == 0
    whole.assert_accounts_close()
    assert (whole.run.report / "curves.png").stat().st_size > 10_000
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(whole.run.model)


def test_one_kill_of_each_role(whole_run: WholeRun) -> None:
    whole_run.start()
    whole_run.wait_for_step(1)
    whole_run.kill("actor")
    whole_run.wait_for_step(3)
    whole_run.kill("learner")
    time.sleep(1)
    whole_run.kill("buffer")
    assert whole_run.wait() == 0, whole_run.output()[-4000:]
    assert_complete(whole_run)


def test_kill_of_everything_then_resume(whole_run: WholeRun) -> None:
    whole_run.start()
    whole_run.wait_for_step(3)
    whole_run.kill_everything()
    time.sleep(0.5)
    assert whole_run.pids() == []
    whole_run.resume()
    assert whole_run.wait() == 0, whole_run.output()[-4000:]
    assert_complete(whole_run)


def test_ctrl_c_ends_every_process_and_the_run_resumes(whole_run: WholeRun) -> None:
    whole_run.start(run__total_steps=4)
    whole_run.wait_for_step(1)
    assert whole_run.process is not None
    begin_s = time.monotonic()
    whole_run.process.send_signal(signal.SIGINT)
    assert whole_run.wait() == 130
    assert time.monotonic() - begin_s < 10
    assert whole_run.pids() == []
    whole_run.resume()
    assert whole_run.wait() == 0, whole_run.output()[-4000:]
    assert_complete(whole_run, total_steps=4)
