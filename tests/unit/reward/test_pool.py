"""Scoring processes: verdicts, time limits, deaths, signals."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dapo_hpc.config import RewardSection
from dapo_hpc.reward import pool as pool_module
from dapo_hpc.reward.pool import ScoringPool, Verdict

SCORERS = """
import os, sys, time

def equal(text, ground_truth):
    print("a scorer may print")
    return text == ground_truth

def moody(text, ground_truth):
    if text == "raise":
        raise KeyError("no answer here")
    if text == "hang":
        time.sleep(60)
    if text == "die":
        os._exit(3)
    if text == "die once" and not os.path.exists(ground_truth):
        open(ground_truth, "w").close()
        os._exit(3)
    return True

def modules(text, ground_truth):
    return not {"torch", "vllm", "transformers"} & set(sys.modules)
"""
LIMIT_S = 20.0

Answers = queue.SimpleQueue[tuple[str, Verdict]]
Open = Callable[..., tuple[ScoringPool, Answers]]


@pytest.fixture
def open_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """open_pool("equal", workers=2): a pool with a scorer of this file, and its verdicts."""
    (tmp_path / "scorers_under_test.py").write_text(SCORERS)
    inherited = os.environ.get("PYTHONPATH", "")
    root = str(Path(__file__).parents[3])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), root, inherited]))
    pools: list[ScoringPool] = []

    def make(scorer: str, **settings: float) -> tuple[ScoringPool, Answers]:
        answers: Answers = queue.SimpleQueue()
        config = RewardSection.model_validate(
            {"scorer": f"scorers_under_test:{scorer}", **settings}
        )
        pools.append(ScoringPool(config, lambda key, verdict: answers.put((key, verdict))))
        return pools[-1], answers

    yield make
    for pool in pools:
        pool.close()


def collect(answers: Answers, count: int) -> dict[str, Verdict]:
    return dict(answers.get(timeout=LIMIT_S) for _ in range(count))


def worker_pids(pool: ScoringPool) -> list[int]:
    return [worker.process.pid for worker in pool._workers]


def test_every_response_gets_its_own_verdict(open_pool: Open) -> None:
    pool, answers = open_pool("equal", workers=2)
    for i in range(50):
        pool.submit(f"r{i}", str(i), str(i if i % 3 else -1))
    verdicts = collect(answers, 50)
    assert {key: v.is_correct for key, v in verdicts.items()} == {
        f"r{i}": bool(i % 3) for i in range(50)
    }
    assert pool.cpu_s > 0


def test_a_worker_holds_neither_torch_nor_vllm(open_pool: Open) -> None:
    pool, answers = open_pool("modules")
    pool.submit("r", "", "")
    assert collect(answers, 1)["r"].is_correct


def test_a_scorer_that_raises_counts_as_wrong(open_pool: Open) -> None:
    pool, answers = open_pool("moody")
    pool.submit("bad", "raise", "")
    pool.submit("good", "fine", "")
    verdicts = collect(answers, 2)
    assert verdicts == {"bad": Verdict(is_correct=False), "good": Verdict(is_correct=True)}
    assert (pool.num_errors, pool.num_timeouts) == (1, 0)


def test_a_scorer_that_hangs_is_killed_and_its_worker_replaced(open_pool: Open) -> None:
    pool, answers = open_pool("moody", timeout_s=0.5)
    pool.submit("warm", "fine", "")
    collect(answers, 1)
    [pid] = worker_pids(pool)
    started_s = time.monotonic()
    pool.submit("slow", "hang", "")
    pool.submit("next", "fine", "")
    verdicts = collect(answers, 2)
    assert verdicts["slow"] == Verdict(is_correct=False, is_timeout=True)
    assert verdicts["next"] == Verdict(is_correct=True)
    assert 0.5 <= time.monotonic() - started_s < 10
    assert pool.num_timeouts == 1
    assert worker_pids(pool) != [pid]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_killed_worker_is_replaced_and_its_response_scored_again(
    open_pool: Open, tmp_path: Path
) -> None:
    pool, answers = open_pool("moody")
    pool.submit("r", "die once", str(tmp_path / "died"))
    assert collect(answers, 1) == {"r": Verdict(is_correct=True)}
    [pid] = worker_pids(pool)
    os.kill(pid, signal.SIGKILL)
    pool.submit("again", "fine", "")
    assert collect(answers, 1) == {"again": Verdict(is_correct=True)}


def test_a_response_that_kills_every_worker_counts_as_wrong(open_pool: Open) -> None:
    pool, answers = open_pool("moody")
    pool.submit("r", "die", "")
    pool.submit("next", "fine", "")
    assert collect(answers, 2) == {
        "r": Verdict(is_correct=False),
        "next": Verdict(is_correct=True),
    }
    assert pool.num_errors == 1


def test_workers_leave_termination_to_the_actor(open_pool: Open) -> None:
    pool, answers = open_pool("moody")
    pool.submit("warm", "fine", "")
    collect(answers, 1)
    [pid] = worker_pids(pool)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        os.kill(pid, number)
    pool.submit("r", "fine", "")
    assert collect(answers, 1) == {"r": Verdict(is_correct=True)}
    assert worker_pids(pool) == [pid]


def test_close_ends_a_hanging_worker(open_pool: Open) -> None:
    pool, _ = open_pool("moody")
    pool.submit("slow", "hang", "")
    [pid] = worker_pids(pool)
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_workers_die_with_an_actor_that_is_killed(open_pool: Open) -> None:
    open_pool("moody")  # puts the scorers on PYTHONPATH
    program = (
        "import time\n"
        "from dapo_hpc.config import RewardSection\n"
        "from dapo_hpc.reward.pool import ScoringPool\n"
        "pool = ScoringPool(RewardSection(scorer='scorers_under_test:moody'), print)\n"
        "pool.submit('slow', 'hang', '')\n"
        "while pool._workers[0].job is None: time.sleep(0.01)\n"
        "print(pool._workers[0].process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    words = [sys.executable, "-c", program]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as actor:
        assert actor.stdout is not None
        pid = int(actor.stdout.readline())
        os.kill(pid, 0)
        actor.kill()
    deadline_s = time.monotonic() + LIMIT_S
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()


def test_workers_that_never_start_stop_the_pool_with_a_reason(open_pool: Open) -> None:
    pool, _ = open_pool("no_such_function")
    deadline_s = time.monotonic() + LIMIT_S
    while pool.failure is None and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert pool.failure is not None
    assert f"{pool_module.MAX_TRIES} scoring workers in a row died" in pool.failure
    assert "no_such_function" in pool.failure
