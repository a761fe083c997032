"""Ledger, segments and the writing thread together: nothing is let go before it is on disk."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dapo_hpc.buffer import segments as segments_module
from dapo_hpc.buffer import writer as writer_module
from dapo_hpc.buffer.book import Book
from dapo_hpc.buffer.events import decode_event
from dapo_hpc.buffer.ledger import Ledger
from dapo_hpc.buffer.segments import Record, Segments
from dapo_hpc.buffer.server import replay
from dapo_hpc.buffer.writer import DiskFull, Job, Store, Writer
from tests.buffer_world import World, make_prompts

FULL = 2
"""SQLite's number for synchronous=FULL."""


def open_store(directory: Path, incarnation: int = 1) -> tuple[Store, Ledger]:
    ledger = Ledger(directory)
    return Store(ledger, Segments(directory / "segments", incarnation)), ledger


def job(
    events: list[bytes] | None = None,
    payloads: dict[int, bytes] | None = None,
    freed: list[int] | None = None,
    snapshot: bytes | None = None,
) -> Job:
    records = {k: Record.of(content) for k, content in (payloads or {}).items()}
    return Job(events or [], records, freed or [], snapshot, lambda: None)


def busy_history() -> World:
    """Steps, an expiry, surplus, a commit and a rollback."""
    world = World(make_prompts(20))
    world.start(is_evaluated=True)
    for step in (1, 2, 3):
        world.fill(step)
        world.publish(step)
        if step == 2:
            world.commit(1)
    world.lease()
    world.tick(40)
    world.start(2)
    world.fill(3)
    return world


def test_replay_gives_the_same_state(tmp_path: Path) -> None:
    world = busy_history()
    store, _ = open_store(tmp_path)
    for body in world.disk:
        store.write([job([body])])
    store.close()
    assert replay(Ledger(tmp_path)).snapshot() == world.core.book.snapshot()


def test_replay_from_a_snapshot_gives_the_same_state(tmp_path: Path) -> None:
    world = busy_history()
    half = len(world.disk) // 2
    store, _ = open_store(tmp_path)
    book = Book()
    for body in world.disk[:half]:
        book.apply(decode_event(body))
    store.write([job(world.disk[:half], snapshot=book.snapshot())])
    store.write([job(world.disk[half:])])
    store.close()
    ledger = Ledger(tmp_path)
    assert len(list(ledger.events())) == len(world.disk) - half
    assert replay(ledger).snapshot() == world.core.book.snapshot()


def test_records_survive_reopening_and_freed_segments_go(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path)
    store.write([job(payloads={1: b"one", 2: b"two"})])
    store.close()
    again, _ = open_store(tmp_path, incarnation=2)
    assert (again.read(1), again.read(2)) == (b"one", b"two")
    again.write([job(freed=[1])])
    again.delete_unused()
    assert (tmp_path / "segments" / "000001-000001.seg").exists()
    again.write([job(freed=[2])])
    again.delete_unused()
    assert not (tmp_path / "segments" / "000001-000001.seg").exists()
    with pytest.raises(KeyError):
        again.read(1)


def test_a_segment_shorter_than_the_ledger_says_is_refused(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path)
    store.write([job(payloads={1: b"one"})])
    store.close()
    os.truncate(tmp_path / "segments" / "000001-000001.seg", 10)
    with pytest.raises(ValueError, match="records up to byte 47 are durable"):
        open_store(tmp_path, incarnation=2)[0].recover()


def test_a_ledger_of_another_format_is_a_sentence(tmp_path: Path) -> None:
    Ledger(tmp_path).close()
    Ledger(tmp_path).close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(ValueError, match="has format 99; this version of dapo_hpc reads format 2"):
        Ledger(tmp_path)


def test_the_ledger_is_locked_against_a_second_process(tmp_path: Path) -> None:
    _, ledger = open_store(tmp_path)
    ledger.write([b"event"], {}, [], None)
    program = f"from dapo_hpc.buffer.ledger import *; Ledger(Path({str(tmp_path)!r}))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "locked" in result.stderr
    assert not list(tmp_path.glob("*-shm")), "no shared memory file"
    assert ledger._db.execute("PRAGMA synchronous").fetchone() == (FULL,)
    assert ledger._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_full_disk_keeps_nothing_and_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ledger = open_store(tmp_path)
    store.write([job([b"before"], {1: b"one"})])
    pwritev = os.pwritev

    def half(descriptor: int, pieces: list[bytes], offset: int) -> int:
        """Writes a little, then there is no space."""
        content = b"".join(pieces)
        if len(content) < 3:
            raise OSError(errno.ENOSPC, "no space")
        return pwritev(descriptor, [content[: len(content) // 2]], offset)

    size = (tmp_path / "segments" / "000001-000001.seg").stat().st_size
    monkeypatch.setattr(segments_module.os, "pwritev", half)
    with pytest.raises(DiskFull):
        store.write([job([b"full"], {2: b"twotwotwo"})])
    assert (tmp_path / "segments" / "000001-000001.seg").stat().st_size == size
    assert list(ledger.events()) == [b"before"]
    monkeypatch.setattr(segments_module.os, "pwritev", pwritev)
    store.write([job([b"full"], {2: b"twotwotwo"})])
    assert list(ledger.events()) == [b"before", b"full"]
    assert store.read(2) == b"twotwotwo"


def test_a_full_ledger_keeps_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    store, ledger = open_store(tmp_path)
    pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._db.execute(f"PRAGMA max_page_count={pages + 1}")
    big = job([b"x" * 100_000], {1: b"one"})
    with pytest.raises(DiskFull):
        store.write([big])
    assert list(ledger.events()) == []
    ledger._db.execute("PRAGMA max_page_count=1000000")
    store.write([big])
    assert list(ledger.events()) == big.events
    assert store.read(1) == b"one"


def test_a_group_commit_takes_so_many_bytes_and_keeps_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "GROUP_BYTES", 10)
    store, _ = open_store(tmp_path)
    writer = Writer(store, lambda: None, pytest.fail, full_mark=tmp_path / "DISK_FULL")
    for number in range(4):
        writer.put(job(payloads={number: b"%06d" % number}))
        writer.put(job([b"a heartbeat"]))
    groups = iter(writer.take, [])
    assert [[job.num_bytes for job in group] for group in groups] == [[6, 0, 6], [0, 6, 0, 6], [0]]


def test_a_sparse_segment_is_emptied_in_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "MOVED_BYTES", 1)
    store = Store(Ledger(tmp_path), Segments(tmp_path, 1, segment_bytes=1000))
    store.write([job(payloads={n: b"%0100d" % n for n in range(20)})])
    store.write([job(payloads={20: b"in the next segment"})])
    first = tmp_path / "000001-000001.seg"
    store.write([job(freed=list(range(4, 20)))])
    store.write([job(snapshot=b"state")])
    for _ in range(3):
        store.delete_unused()
        assert first.exists()
        store.write([job([b"a commit"])])
    store.delete_unused()
    assert not first.exists()
    assert [store.read(n) for n in range(4)] == [b"%0100d" % n for n in range(4)]


class Recorder:
    """A writer on a real store, with what it let go and how it failed."""

    def __init__(self, directory: Path) -> None:
        self.store, self.ledger = open_store(directory)
        self.done: list[int] = []
        self.failures: list[BaseException] = []
        self.failed = threading.Event()
        self.owner_error: Exception | None = None
        self.writer = Writer(
            self.store, self._check_owner, self._on_fatal, full_mark=directory / "DISK_FULL"
        )
        self.writer.start()

    def _check_owner(self) -> None:
        if self.owner_error is not None:
            raise self.owner_error

    def _on_fatal(self, error: BaseException) -> None:
        self.failures.append(error)
        self.failed.set()

    def put(self, number: int, **parts: object) -> None:
        base = job(**parts)  # type: ignore[arg-type]
        self.writer.put(replace(base, done=lambda: self.done.append(number)))


def test_replies_leave_in_order_after_their_events_are_durable(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for number in range(200):
        recorder.put(number, events=[b"%d" % number] if number % 3 else [])
    recorder.writer.stop()
    assert recorder.done == list(range(200))
    assert list(recorder.ledger.events()) == [b"%d" % n for n in range(200) if n % 3]


def test_a_payload_can_be_read_before_it_is_written(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.put(0, payloads={7: b"seven"})
    assert recorder.store.read(7) == b"seven"
    recorder.writer.stop()
    assert recorder.store.unwritten == {}
    assert recorder.store.read(7) == b"seven"


def test_replies_wait_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "FULL_RETRY_S", 0.05)
    recorder = Recorder(tmp_path)
    pages = recorder.ledger._db.execute("PRAGMA page_count").fetchone()[0]
    recorder.ledger._db.execute(f"PRAGMA max_page_count={pages + 1}")
    recorder.put(1, events=[b"x" * 100_000])
    time.sleep(0.3)
    assert recorder.done == []
    recorder.ledger._db.execute("PRAGMA max_page_count=1000000")
    recorder.writer.stop()
    assert recorder.done == [1]
    assert recorder.failures == []


def test_an_error_at_sync_is_fatal_and_nothing_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(tmp_path)

    def broken(_: int) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(segments_module.os, "fdatasync", broken)
    recorder.put(1, payloads={1: b"one"})
    assert recorder.failed.wait(5)
    assert recorder.done == []
    assert list(recorder.ledger.events()) == []


def test_a_newer_owner_ends_the_writer_before_the_reply(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.put(1, events=[b"mine"])
    while not recorder.done:
        time.sleep(0.01)
    recorder.owner_error = RuntimeError("taken over")
    recorder.put(2, events=[b"too late"])
    assert recorder.failed.wait(5)
    assert recorder.done == [1]
    assert list(recorder.ledger.events()) == [b"mine"]
