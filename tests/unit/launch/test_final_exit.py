"""A process that knows its failure is final is not started again; any other one is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dapo_hpc.config import dump
from dapo_hpc.launch.local import FAILED
from dapo_hpc.launch.supervise import Exit, GiveUp, Restart, RestartPolicy
from dapo_hpc.observe.final import FINAL_EXIT, Final, refusals_are_final
from dapo_hpc.observe.log import last_line, message_of
from tests.unit.launch.test_local_processes import LEAVE_ON_TERM, command, run

ROOT = Path(__file__).resolve().parents[3]
FAILS = """
    from dapo_hpc.observe import log
    from dapo_hpc.observe.final import refusals_are_final

    log.setup("learner-0")
    try:
        {inside}
            raise ValueError("learner.tensor_parallel = 3 does not divide 4 heads.")
    except Exception as error:
        log.exit_with_cause(error)
"""


def starts(log: Path) -> int:
    return log.read_text().count("attempt ")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.parametrize(
    ("inside", "number", "words"),
    [
        ("with refusals_are_final():", 1, "(exit 3) at its first start; another start would end"),
        ("if True:", 3, "(exit 1) after 2 restarts; the run stops."),
    ],
    ids=["final", "perhaps an accident"],
)
def test_only_what_is_not_final_is_tried_again(
    inside: str, number: int, words: str, tmp_path: Path
) -> None:
    fails = command(tmp_path, "learner", FAILS.format(inside=inside))
    outcome, view = run([fails, command(tmp_path, "buffer", LEAVE_ON_TERM)])
    assert outcome == FAILED
    assert starts(fails.log) == number
    assert words in view.said[-1]
    assert "\n  learner.tensor_parallel = 3 does not divide 4 heads.\n" in view.said[-1]


def test_ranks_that_die_of_a_final_failure_do_not_hide_it(tmp_path: Path) -> None:
    """Both end within one look of the launcher; the first one listed dies of the other's death."""
    ready = tmp_path / "ready"
    peer = f"""
        import pathlib, sys, time
        while not pathlib.Path({str(ready)!r}).exists():
            time.sleep(0.001)
        sys.exit({{code}})
    """
    commands = [
        command(tmp_path, f"learner-{rank}", peer.format(code=code), unit="learner")
        for rank, code in enumerate((1, FINAL_EXIT))
    ]
    opens = f"import pathlib, time; time.sleep(0.8); pathlib.Path({str(ready)!r}).touch()"
    stays = command(tmp_path, "buffer", f"{opens}; time.sleep(60)")
    outcome, view = run([stays, *commands], stop_s=0.2)
    assert outcome == FAILED
    assert "(exit 3)" in view.said[-1]
    assert [starts(each.log) for each in commands] in ([1, 1], [2, 2])


def test_the_rule() -> None:
    policy = RestartPolicy(leader="learner", sizes={"learner": 1, "actor-0": 1}, max_restarts=3)
    by_accident = Exit(unit="actor-0", process="actor-0", code=1)
    finally_ = Exit(unit="actor-0", process="actor-0", code=FINAL_EXIT)
    assert isinstance(policy.decide(by_accident, is_complete=False, step=0), Restart)
    assert policy.decide(finally_, is_complete=False, step=0) == GiveUp(
        unit="actor-0", restarts=1, is_final=True
    )


def test_only_refusals_become_final() -> None:
    with pytest.raises(Final, match="no such model"), refusals_are_final():
        raise ValueError("no such model")
    with pytest.raises(OSError, match="disk"), refusals_are_final():
        raise OSError("disk")


def test_a_learner_refuses_what_the_plan_refuses_and_says_that_it_is_final(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    from tests.learner_parts import make_config, make_model

    make_model(tmp_path / "model")
    config = make_config(tmp_path / "model", tmp_path, learner={"freeze": ["layers.7"]})
    config.run_dir.mkdir()
    (config.run_dir / "config.toml").write_text(dump(config))
    words = [sys.executable, "-m", "dapo_hpc.cli", "role", "learner", "--run", str(config.run_dir)]
    done = subprocess.run(words, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == FINAL_EXIT
    log = tmp_path / "log"
    log.write_text(done.stderr)
    cause = message_of(last_line(log))
    assert cause.startswith("learner.freeze names layer 7, but the model has 2 layers")
