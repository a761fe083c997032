"""The local launcher with real processes: small scripts stand in for the roles."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from dapo_hpc.launch.local import COMPLETE, FAILED, INTERRUPTED, StopRequest, run_units
from dapo_hpc.launch.process import RoleCommand
from dapo_hpc.observe.live import ProcessState

ROOT = Path(__file__).resolve().parents[3]
STAY = "import time; time.sleep(60)"
STAY_DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
LEAVE_ON_TERM = """
    import signal, sys, time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    time.sleep(60)
"""


class Recorder:
    """A view that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.states: list[Sequence[ProcessState]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def update(self, processes: Sequence[ProcessState]) -> None:
        self.states.append(processes)

    def close(self) -> None:
        return


def command(tmp_path: Path, name: str, script: str, unit: str = "") -> RoleCommand:
    words = (sys.executable, "-c", textwrap.dedent(script))
    log = tmp_path / f"{name}.log"
    return RoleCommand(name=name, unit=unit or name, words=words, log=log, threads=1)


def run(
    commands: list[RoleCommand],
    *,
    leader: str = "learner",
    max_restarts: int = 2,
    request: StopRequest | None = None,
    stop_s: float = 2.0,
) -> tuple[int, Recorder]:
    view = Recorder()
    outcome = run_units(
        commands,
        leader=leader,
        is_complete=lambda: True,
        step=lambda: 0,
        max_restarts=max_restarts,
        stop_s=stop_s,
        view=view,
        request=request or StopRequest(),
    )
    return outcome, view


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_dead(pids: list[int], limit_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline_s, f"still alive: {[p for p in pids if is_alive(p)]}"
        time.sleep(0.02)


def test_leader_that_ends_well_ends_the_others(tmp_path: Path) -> None:
    stays = command(tmp_path, "actor-0", "print('up', flush=True)\n" + STAY)
    leads = command(tmp_path, "learner", "import time; time.sleep(0.5)")
    begin_s = time.monotonic()
    outcome, view = run([stays, leads], stop_s=1.0)
    assert outcome == COMPLETE
    assert time.monotonic() - begin_s < 9
    assert view.said == []
    assert "=== actor-0, attempt 1" in stays.log.read_text()


def test_death_is_restarted_and_its_cause_is_told(tmp_path: Path) -> None:
    marker = tmp_path / "died"
    script = f"""
        import pathlib, sys
        marker = pathlib.Path({str(marker)!r})
        if not marker.exists():
            marker.touch()
            print("12:00:00 CRITICAL learner-0: weights v41 are torn.")
            sys.exit(4)
    """
    outcome, view = run([command(tmp_path, "learner", script)])
    assert outcome == COMPLETE
    assert view.said == [
        "learner ended (exit 4): weights v41 are torn.\n  restart 1 of 2 in 1 s",
    ]
    assert "attempt 2" in (tmp_path / "learner.log").read_text()


def test_too_many_deaths_end_the_run_naming_the_log(tmp_path: Path) -> None:
    dies = command(tmp_path, "actor-0", "print('no weights'); raise SystemExit(1)")
    stays = command(tmp_path, "learner", LEAVE_ON_TERM)
    outcome, view = run([dies, stays], max_restarts=1)
    assert outcome == FAILED
    assert "no weights" in view.said[-1]
    assert str(dies.log) in view.said[-1]
    assert "after 1 restart" in view.said[-1]


def test_one_dead_rank_restarts_every_rank(tmp_path: Path) -> None:
    marker = tmp_path / "died"
    dies_once = f"""
        import pathlib, sys, time
        marker = pathlib.Path({str(marker)!r})
        if not marker.exists():
            marker.touch()
            time.sleep(0.3)
            sys.exit(1)
    """
    other = f"""
        import pathlib, time
        died = pathlib.Path({str(marker)!r}).exists
        first = not died()
        time.sleep(60 if first else 0)
    """
    starts_later = "import time; time.sleep(0.2)\n"
    commands = [
        command(tmp_path, "learner-1", textwrap.dedent(other), unit="learner"),
        command(tmp_path, "learner-0", starts_later + textwrap.dedent(dies_once), unit="learner"),
    ]
    outcome, view = run(commands)
    assert outcome == COMPLETE
    assert len(view.said) == 1
    assert "attempt 2" in (tmp_path / "learner-1.log").read_text()


def test_stop_request_kills_the_deaf_within_the_limit(tmp_path: Path) -> None:
    pids = tmp_path / "pid"
    script = f"import os; open({str(pids)!r}, 'w').write(str(os.getpid()))\n" + STAY_DEAF
    request = StopRequest()
    deaf = command(tmp_path, "learner", script)
    threading.Timer(1.0, request, args=(signal.SIGINT, None)).start()
    begin_s = time.monotonic()
    outcome, view = run([deaf], request=request, stop_s=1.0)
    assert outcome == INTERRUPTED
    assert time.monotonic() - begin_s < 4
    assert view.said[0].startswith("Stopping")
    assert not is_alive(int(pids.read_text()))


def test_what_a_dead_role_leaves_behind_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pid"
    script = f"""
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", {STAY!r}])
        open({str(pids)!r}, "w").write(str(child.pid))
    """
    outcome, _ = run([command(tmp_path, "learner", script)])
    assert outcome == COMPLETE
    wait_until_dead([int(pids.read_text())])


LAUNCHER = """
    import sys
    from pathlib import Path
    from dapo_hpc.launch import local
    from dapo_hpc.launch.process import RoleCommand
    from dapo_hpc.observe.live import Follower, PlainView, Progress

    here = Path(sys.argv[1])
    script = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    commands = [
        RoleCommand(name=name, unit=name, log=here / f"{name}.log", threads=1,
                    words=(sys.executable, "-c", script, str(here / f"{name}.pid")))
        for name in ("buffer", "actor-0", "learner")
    ]
    view = PlainView(Follower(here / "metrics.jsonl"), Progress("step", 1), ())
    with local.stop_requests() as request:
        sys.exit(local.run_units(commands, leader="learner", max_restarts=1, stop_s=8.0,
                                 is_complete=lambda: True, step=lambda: 0,
                                 view=view, request=request))
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, INTERRUPTED),  # Ctrl-C
        (signal.SIGTERM, INTERRUPTED),  # a batch system that ends the job
        (signal.SIGKILL, -signal.SIGKILL),  # no chance to tidy up: the kernel does it
    ],
)
def test_no_process_outlives_the_launcher(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LAUNCHER), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    files = [tmp_path / f"{name}.pid" for name in ("buffer", "actor-0", "learner")]
    deadline_s = time.monotonic() + 20
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline_s, "the stand-ins did not start"
        time.sleep(0.05)
    begin_s = time.monotonic()
    launcher.send_signal(number)
    assert launcher.wait(timeout=10) == code
    wait_until_dead([int(file.read_text()) for file in files])
    assert time.monotonic() - begin_s < 10
