"""A fault at every durable step of writer, ledger, segments and owner; then reopen and compare.

The model is the list of requests that were answered. A reopened buffer knows all of them, and of
the one that was under way everything or nothing.
"""

from __future__ import annotations

import errno
import logging
import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dapo_hpc.buffer import owner
from dapo_hpc.buffer import writer as writer_module
from dapo_hpc.buffer.book import Book
from dapo_hpc.buffer.events import decode_event, encode_event
from dapo_hpc.buffer.ledger import Ledger
from dapo_hpc.buffer.owner import Ownership, take_ownership
from dapo_hpc.buffer.segments import HEADER, Record, Segments
from dapo_hpc.buffer.server import inherit
from dapo_hpc.buffer.writer import DiskFull, Job, Store, Writer
from dapo_hpc.observe.status import status_text
from dapo_hpc.run_dir import RunDir
from tests.buffer_world import World, make_prompts, piece
from tests.chaos.disk import Disk, FaultKind, Killed, Plan, faulty, keep_ledger
from tests.chaos.world import directory_in_memory

SEGMENT_BYTES = 1500
"""Small, so that segments are begun, emptied, moved and deleted within the history."""
SNAPSHOT_EVERY = 9


class Recorder(World):
    """Notes each request's effects as the job that the service would give to the writer."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        super().__init__(make_prompts(20))

    def flush(self) -> None:
        effects = self.core.take_effects()
        self.records |= {k: record.content for k, record in effects.payloads.items()}
        self.jobs.append(
            Job(
                events=[encode_event(event) for event in effects.events],
                payloads=effects.payloads,
                freed=effects.freed,
                snapshot=self._snapshot(),
                done=lambda: None,
            )
        )

    def _snapshot(self) -> bytes | None:
        is_due = len(self.jobs) % SNAPSHOT_EVERY == SNAPSHOT_EVERY - 1
        return self.core.book.snapshot() if is_due else None


def history() -> list[Job]:
    """Leases, heartbeats, submits, a lost actor, batches, commits, a rollback."""
    world = Recorder()
    world.start(is_evaluated=True)
    for step in (1, 2, 3):
        lease = next(x for x in world.lease() if x.kind == "train")
        world.heartbeat(lease.lease_id, [piece(0, 0, 40, world.core.book.state.newest)], [0])
        world.tick(40)
        world.fill(step)
        world.publish(step)
        if step > 1:
            world.commit(step - 1)
    world.start(2)
    world.fill(3)
    return [job for job in world.jobs if not job.is_empty]


@dataclass(frozen=True, slots=True)
class Expected:
    """After so many jobs."""

    state: bytes
    records: dict[int, bytes]


def model(jobs: list[Job]) -> list[Expected]:
    """What must be on disk after 0, 1, 2, ... jobs."""
    book, records = Book(), {}
    found = [Expected(book.snapshot(), {})]
    for job in jobs:
        for body in job.events:
            book.apply(decode_event(body))
        new = {k: record.content for k, record in job.payloads.items()}
        records = {k: v for k, v in (records | new).items() if k not in job.freed}
        found.append(Expected(book.snapshot(), records))
    return found


JOBS = history()
MODEL = model(JOBS)


class Process:
    """One life of a buffer's disk side; `num_acked` counts the jobs that were answered."""

    def __init__(self, directory: Path, plan: Plan | None = None) -> None:
        self.directory = directory
        self.disk = Disk(random.Random(1), lambda: None)
        self.disk.plan = plan
        self.disk.is_logging = True
        self.owned: Ownership | None = None
        self.store: Store | None = None
        self.num_acked = 0

    def open(self) -> Book:
        self.owned = take_ownership(self.directory)
        self.store, book = inherit(self.owned, 0.0, sleep=lambda _: None)
        self.writer = Writer(
            self.store, self.owned.check, lambda _: None, full_mark=self.directory / "DISK_FULL"
        )
        return book

    def work(self, jobs: list[Job]) -> None:
        for job in jobs:
            self.writer.attempt([job])
            self.disk.step("reply")
            self.num_acked += 1

    def run(self) -> None:
        """Open, and do the rest of the history."""
        self.open()
        self.work(JOBS[FIRST:])

    def die(self, *, has_power: bool = True) -> None:
        if not has_power:
            self.disk.lose_unsynced()
        if self.store is not None:
            assert self.owned is not None
            keep_ledger(self.owned.ledger, self.store.close)

    def assert_holds(self, book: Book, expected: Expected) -> None:
        assert self.store is not None
        assert book.snapshot() == expected.state
        assert {k: self.store.read(k) for k in expected.records} == expected.records


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Segments.__init__.__kwdefaults__, "segment_bytes", SEGMENT_BYTES)


@pytest.fixture
def base() -> Iterator[Path]:
    """Four fifths of the history are on disk; its process was killed."""
    with directory_in_memory() as directory:
        with faulty(lambda: None):
            process = Process(directory / "base")
            process.open()
            process.work(JOBS[:FIRST])
            process.die()
        yield directory / "base"


FIRST = 4 * len(JOBS) // 5


def steps(base: Path) -> list[str]:
    """What the process does at each durable step of opening and of the rest of the history."""
    process = copy_of(base)
    with faulty(lambda: process.disk):
        process.run()
        process.die()
    return process.disk.names


def copy_of(base: Path, plan: Plan | None = None) -> Process:
    directory = base.with_name("copy")
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(base, directory)
    return Process(directory, plan)


def reopened(process: Process) -> Iterator[tuple[Process, Book]]:
    """A successor without faults."""
    successor = Process(process.directory)
    with faulty(lambda: successor.disk):
        yield successor, successor.open()
        successor.die()


def assert_continues(process: Process, num_known: set[int]) -> None:
    """A successor knows one of these numbers of jobs, and does the rest as if nothing had been."""
    for successor, book in reopened(process):
        known = next(n for n in sorted(num_known) if MODEL[n].state == book.snapshot())
        successor.assert_holds(book, MODEL[known])
        successor.work(JOBS[known:])
    for successor, book in reopened(process):
        successor.assert_holds(book, MODEL[-1])


def num_known(process: Process, names: list[str], kind: FaultKind) -> set[int]:
    """How many jobs may be on disk after the fault."""
    done = FIRST + process.num_acked
    replies = [number for number, name in enumerate(names) if name == "reply"]
    since = names[replies[process.num_acked - 1] :] if process.num_acked else names
    if "committed" not in since:
        return {done}
    is_torn = kind == "power" and names[-1] == "committed"
    return {done, done + 1} if is_torn else {done + 1}


def test_the_history_makes_every_kind_of_step(base: Path) -> None:
    made = Counter(steps(base))
    assert set(made) == {
        "link", "rename", "create", "write", "written", "fsync", "fsynced", "transaction",
        "inserted", "committed", "checked", "delete", "reply",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["kill", "power"])
def test_a_crash_at_every_step(base: Path, kind: FaultKind) -> None:
    names = steps(base)
    for number in range(1, len(names) + 1):
        process = copy_of(base, Plan(kind, number))
        with faulty(lambda process=process: process.disk), pytest.raises(Killed) as killed:
            process.run()
        process.die(has_power=killed.value.has_power)
        made = process.disk.names
        assert made == names[:number], "the same steps each time"
        assert_continues(process, num_known(process, made, kind))


def test_without_fsync_the_same_crashes_lose_answers(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""
    monkeypatch.setattr(Segments, "sync", lambda _: None)
    with pytest.raises(ValueError, match="The file system lost data"):
        test_a_crash_at_every_step(base, "power")


def test_a_full_disk_at_the_start_is_waited_for(base: Path) -> None:
    """The ledger cannot be copied; when there is space, the same process goes on."""
    process = copy_of(base)
    waits: list[float] = []
    copyfile = shutil.copyfile

    def full_twice(source: Path, target: Path) -> None:
        if len(waits) < 2 * NUM_SLEEPS:
            raise OSError(errno.ENOSPC, "no space")
        copyfile(source, target)

    process.owned = take_ownership(process.directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner.shutil, "copyfile", full_twice)
        process.store, book = inherit(process.owned, 0.0, sleep=waits.append)
    process.assert_holds(book, MODEL[FIRST])
    process.die()
    assert waits.count(writer_module.FULL_RETRY_S) == 2


NUM_SLEEPS = 2
"""For a predecessor that may be alive, and for space."""


def test_an_error_at_every_step_ends_the_process_without_an_answer(base: Path) -> None:
    names = steps(base)
    for number in [n for n, name in enumerate(names, 1) if name in CAN_FAIL]:
        process = copy_of(base, Plan("eio", number))
        with (
            faulty(lambda process=process: process.disk),
            pytest.raises((OSError, sqlite3.Error)) as error,
        ):
            process.run()
        assert not isinstance(error.value, DiskFull)
        process.die()
        assert_continues(process, {FIRST + process.num_acked})


CAN_FAIL = ("create", "write", "fsync", "transaction")


def test_a_full_disk_at_every_step_keeps_nothing_and_goes_on(base: Path) -> None:
    names = steps(base)
    for number in [n for n, name in enumerate(names, 1) if name in ("create", "write")]:
        _fill_up_at(base, number)
    for number in [n for n, name in enumerate(names, 1) if name == "transaction"]:
        _fill_up_at(base, number)


def _fill_up_at(base: Path, number: int) -> None:
    process = copy_of(base, Plan("full", number))
    with faulty(lambda: process.disk):
        with pytest.raises(DiskFull):
            process.run()
        assert process.store is not None
        expected = MODEL[FIRST + process.num_acked]
        held = {record_id: process.store.read(record_id) for record_id in expected.records}
        assert held == expected.records
        process.work(JOBS[FIRST + process.num_acked :])
        process.die()
    assert_continues(process, {len(JOBS)})


def test_short_writes_are_finished(base: Path) -> None:
    names = steps(base)
    for number in [n for n, name in enumerate(names, 1) if name == "write"]:
        process = copy_of(base, Plan("short", number))
        with faulty(lambda process=process: process.disk):
            process.run()
            process.die()
        assert_continues(process, {len(JOBS)})


def test_a_torn_last_record_is_cut(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest = max(base.glob("ledger.1/*.seg"))
    size = newest.stat().st_size
    with open(newest, "ab") as file:
        file.write(b"DPR1 and a part of what was to follow")
    process = Process(base)
    with caplog.at_level(logging.WARNING):
        process.assert_holds(process.open(), MODEL[FIRST])
    assert newest.name in caplog.text
    assert (base / "ledger.2" / newest.name).stat().st_size == size
    process.die()


def test_a_durable_record_with_other_bytes_is_refused(base: Path) -> None:
    """An fsync that said yes and did not write: the run cannot be continued, and says so."""
    newest = max(base.glob("ledger.1/*.seg"))
    with open(newest, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\0")
    with pytest.raises(ValueError, match="which the ledger calls durable, is damaged"):
        Process(base).open()


def test_a_predecessor_that_wakes_up_takes_nothing_away(base: Path) -> None:
    """It ends one group commit after its successor copied the ledger, and deletes a segment."""
    old = Process(base)
    old.open()
    freeing = next(i for i, job in enumerate(JOBS[FIRST:], FIRST) if job.freed)
    old.work(JOBS[FIRST:freeing])
    assert old.store is not None
    before = sorted(path.name for path in base.glob("ledger.2/*.seg"))
    successor = Process(base)
    book = successor.open()
    for job in JOBS[freeing:]:
        old.store.write([job])
    old.store.delete_unused()
    assert sorted(path.name for path in base.glob("ledger.2/*.seg")) != before
    successor.assert_holds(book, MODEL[freeing])
    successor.work(JOBS[freeing:])
    successor.die()
    old.die()
    for last, last_book in reopened(successor):
        last.assert_holds(last_book, MODEL[-1])


@pytest.mark.parametrize("sparse_frac", [writer_module.SPARSE_FRAC, 0.0])
def test_sparse_segments_are_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparse_frac: float
) -> None:
    """One record that stays does not keep its whole segment; negative control: nothing moves."""
    monkeypatch.setattr(writer_module, "SPARSE_FRAC", sparse_frac)
    store = Store(Ledger(tmp_path), Segments(tmp_path, 1))
    for first in range(0, 4000, 100):
        records = {first + i: Record.of(bytes(100)) for i in range(10)}
        store.write([Job([], records, [], None, lambda: None)])
        store.write([Job([], {}, [k for k in records if k != first], b"state", lambda: None)])
        store.delete_unused()
    assert {len(store.read(first)) for first in range(0, 4000, 100)} == {100}
    needed = 40 * (HEADER.size + 100)
    used = sum(path.stat().st_size for path in tmp_path.glob("*.seg"))
    if sparse_frac:
        assert used <= needed / sparse_frac + 2 * SEGMENT_BYTES
    else:
        assert used == 10 * needed
    store.close()


def test_a_full_disk_is_told_in_log_and_status_until_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDir(tmp_path)
    run.config.write_text("[run]\ntotal_steps = 1\n")
    (run.buffer / "ledger").mkdir(parents=True)
    run.disk_full.touch()  # left by a predecessor
    store = Store(Ledger(run.buffer / "ledger"), Segments(run.buffer / "ledger", 1))
    answered: list[int] = []
    texts: list[str] = []
    write = Store.write

    def full_twice(self: Store, jobs: list[Job]) -> None:
        if len(texts) < 2:
            texts.append(status_text(run))
            raise DiskFull(str(OSError(errno.ENOSPC, "no space")))
        texts.append(status_text(run))
        assert answered == []
        write(self, jobs)

    monkeypatch.setattr(Store, "write", full_twice)
    monkeypatch.setattr(writer_module, "FULL_RETRY_S", 0.01)
    writer = Writer(store, lambda: None, lambda error: texts.append(repr(error)),
                    full_mark=run.disk_full)  # fmt: skip
    writer.start()
    writer.put(Job([b"event"], {}, [], None, lambda: answered.append(1)))
    writer.stop()
    store.close()
    assert answered == [1]
    assert ["is full" in text for text in texts] == [False, True, True]
    assert "is full" not in status_text(run)
    assert "nothing is acknowledged" in caplog.text
    assert "there is space" in caplog.text
