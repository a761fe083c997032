"""The commands of the README on a real run: train, status, report, eval, and a second start."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.fault.whole_run import DEMO, ROOT, WholeRun, set_options


def dapo_says(*words: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "dapo_hpc.cli", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr


def test_train_then_look_at_it_and_evaluate_it(whole_run: WholeRun) -> None:
    whole_run.start(run__total_steps=2, eval__every=2)
    assert whole_run.wait() == 0, whole_run.output()[-4000:]
    root = str(whole_run.run.root)

    code, text = dapo_says("status", root)
    assert code == 0, text
    assert ": complete" in text
    assert "2/2" in text
    (whole_run.run.report / "curves.png").unlink()
    assert dapo_says("report", root)[0] == 0
    assert (whole_run.run.report / "curves.png").exists()

    code, text = dapo_says("train", str(DEMO), *set_options(whole_run.paths()))
    assert code == 2, text
    assert "--resume" in text

    settings = {**whole_run.paths(), "rollout.max_response_tokens": 24, "eval.samples": 2}
    model = str(whole_run.run.model)
    code, text = dapo_says("eval", str(DEMO), "--model", model, *set_options(settings))
    assert code == 0, text
    (result,) = (whole_run.directory / "run-eval" / "eval").glob("*.json")
    accuracy = json.loads(result.read_text())["accuracy"]
    assert f"{accuracy:.4f}" in text
    assert 0 < accuracy < 0.55, "a model that guesses digits is right in one case of ten, or a few"
