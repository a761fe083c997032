"""The last line of a failed process is its cause."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dapo_hpc.observe.log import (
    attempt_header,
    begin_attempt,
    cause_of,
    last_line,
    last_message,
    message_of,
)

ROOT = Path(__file__).resolve().parents[3]

FAILS = """
import atexit
from dapo_hpc.observe import log
atexit.register(print, "chatter of a library that is torn down")
log.setup("learner-1")
try:
    {"a": 1}["b"]
except KeyError as error:
    log.exit_with_cause(error)
"""


def test_failure_ends_with_its_cause_and_exit_code_1(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    log = tmp_path / "log"
    log.write_text(done.stderr + done.stdout)
    assert message_of(last_line(log)) == "KeyError: 'b'"
    assert "Traceback" in done.stderr


def test_cause_is_one_line() -> None:
    assert cause_of(ValueError("weights v41 are torn.\n  Fetch again.")) == (
        "weights v41 are torn. Fetch again."
    )
    assert cause_of(OSError("no space")) == "OSError: no space"
    assert cause_of(RuntimeError()) == "RuntimeError"


def test_last_line_looks_through_progress_bars_and_empty_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_line(log) == ""
    log.write_bytes(b"one\nbar 10%\rbar 100%\n\n  \n")
    assert last_line(log) == "bar 100%"


def test_last_message_is_the_roles_own_and_of_its_present_attempt(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_message(log) == "starting"
    log.write_text(attempt_header("actor-0", 1) + "12:00:00 INFO actor-0: loaded.\nchatter\n")
    assert last_message(log) == "loaded."
    with open(log, "a") as file:
        file.write(attempt_header("actor-0", 2) + "chatter\n")
    assert last_message(log) == "starting"


def test_an_attempt_begins_on_a_line_of_its_own(tmp_path: Path) -> None:
    log = tmp_path / "learner.log"
    begin_attempt(log, "learner", 1)
    with open(log, "a") as file:
        file.write("a library that ends without a line end")
    begin_attempt(log, "learner", 2)
    begin_attempt(log, "learner", 3)
    starts = [line[:22] for line in log.read_text().split("\n")]
    assert starts == [
        "=== learner, attempt 1", "a library that ends wi", "=== learner, attempt 2",
        "=== learner, attempt 3", "",
    ]  # fmt: skip


def test_slurms_own_last_line_is_not_the_cause(tmp_path: Path) -> None:
    log = tmp_path / "learner.log"
    log.write_text(
        "12:00:00 CRITICAL learner-0: weights are torn.\n"
        "slurmstepd-n1: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-21T21:18:56 ***\n"
    )
    assert last_line(log).endswith("weights are torn.")
    log.write_text("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.0.\n")
    assert "oom-kill" in last_line(log)
