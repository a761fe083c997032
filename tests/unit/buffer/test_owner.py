"""One owner at a time: numbers are taken once, predecessors are waited for unless they are dead."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dapo_hpc.buffer import owner
from dapo_hpc.buffer.owner import OwnerFenced, ProcessIdentity, inherit_ledger, take_ownership


def _race(directory: Path, barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    try:
        results.put(take_ownership(directory).incarnation)  # type: ignore[attr-defined]
    except OwnerFenced:
        results.put(None)  # type: ignore[attr-defined]


def test_a_number_is_taken_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(6), context.Queue()
    workers = [context.Process(target=_race, args=(tmp_path, barrier, results)) for _ in range(6)]
    for worker in workers:
        worker.start()
    taken = [results.get(timeout=20) for _ in workers]
    for worker in workers:
        worker.join()
    winners = [number for number in taken if number is not None]
    assert len(set(winners)) == len(winners)
    assert sorted(winners) == list(range(1, len(winners) + 1))


def test_the_older_owner_notices(tmp_path: Path) -> None:
    first = take_ownership(tmp_path)
    first.check()
    second = take_ownership(tmp_path)
    second.check()
    with pytest.raises(OwnerFenced, match="incarnation 2 has taken over"):
        first.check()


def test_a_living_predecessor_is_waited_for_and_its_last_words_are_copied(tmp_path: Path) -> None:
    first = take_ownership(tmp_path)
    inherit_ledger(first, 5.0)
    (first.ledger / "ledger.sqlite").write_text("early")
    second = take_ownership(tmp_path)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        (first.ledger / "ledger.sqlite").write_text("late")

    inherit_ledger(second, 5.0, sleep=wait)
    assert waits == [5.0 * owner.GRACE_FRAC]
    assert waits[0] > 5.0
    assert (second.ledger / "ledger.sqlite").read_text() == "late"


def test_a_dead_predecessor_is_not_waited_for(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from dapo_hpc.buffer.owner import *\n"
        "inherit_ledger(take_ownership(Path(sys.argv[1])), 5.0)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    waits: list[float] = []
    inherit_ledger(take_ownership(tmp_path), 5.0, sleep=waits.append)
    assert waits == []


@pytest.mark.parametrize("field", ["boot_id", "pid_namespace"])
def test_a_process_that_would_not_be_visible_counts_as_alive(tmp_path: Path, field: str) -> None:
    first = take_ownership(tmp_path)
    path = first.directory / "owner.1"
    identity = json.loads(path.read_text()) | {"pid": 2**22 - 1, "start_ticks": 1}
    path.unlink()
    path.write_text(json.dumps(identity | {field: "another"}))
    waits: list[float] = []
    inherit_ledger(take_ownership(tmp_path), 1.0, sleep=waits.append)
    assert len(waits) == 1


def test_a_reused_pid_is_another_process() -> None:
    own = ProcessIdentity.own()
    assert own.pid == os.getpid()
    assert not own.is_provably_dead()
    reused = ProcessIdentity(
        host=own.host,
        boot_id=own.boot_id,
        pid_namespace=own.pid_namespace,
        pid=own.pid,
        start_ticks=own.start_ticks - 1,
    )
    assert reused.is_provably_dead()


def test_an_owner_that_died_before_copying_is_passed_over(tmp_path: Path) -> None:
    first = take_ownership(tmp_path)
    inherit_ledger(first, 1.0)
    (first.ledger / "ledger.sqlite").write_text("content")
    take_ownership(tmp_path)
    third = take_ownership(tmp_path)
    inherit_ledger(third, 1.0, sleep=lambda _: None)
    assert (third.ledger / "ledger.sqlite").read_text() == "content"
