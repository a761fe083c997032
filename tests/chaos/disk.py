"""A fake disk under the real ledger, segments and owner: it counts steps, fails, stops and crashes.

Files are real files. What was written and not synced may be gone after a power failure; a ledger
transaction that a crash cuts short leaves a torn write-ahead log.
"""

from __future__ import annotations

import errno
import os
import random
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from dapo_hpc.buffer import owner, segments
from dapo_hpc.buffer.ledger import Ledger
from dapo_hpc.buffer.owner import Ownership
from dapo_hpc.buffer.segments import Segments

FaultKind = Literal["kill", "power", "stop", "eio", "full", "short"]
LEDGER = "ledger.sqlite"


class Killed(BaseException):
    """The process ends here. Not an Exception: nothing may catch it."""

    def __init__(self, *, has_power: bool) -> None:
        super().__init__()
        self.has_power = has_power


@dataclass(slots=True)
class Plan:
    """What happens when the process has made `num_steps` more steps."""

    kind: FaultKind
    num_steps: int


class Disk:
    """What one buffer process sees of the disk."""

    def __init__(self, random: random.Random, stop: Callable[[], None]) -> None:
        self.random = random
        self.plan: Plan | None = None
        self.is_full = False
        self.synced: dict[int, int] = {}
        """Bytes that are sure to be on disk, of each file that is appended to."""
        self.num_steps = 0
        self.names: list[str] = []
        self.is_logging = False
        self._stop = stop

    def step(self, name: str) -> FaultKind | None:
        """A point at which a process can end. Raises Killed, or an error of the disk.

        Returns the fault that the caller has to carry out itself.
        """
        self.num_steps += 1
        if self.is_logging:
            self.names.append(name)
        if self.plan is None:
            return None
        self.plan.num_steps -= 1
        if self.plan.num_steps > 0:
            return None
        plan, self.plan = self.plan, None
        match plan.kind:
            case "stop":
                self._stop()
            case "kill" | "power":
                raise Killed(has_power=plan.kind == "kill")
            case "eio":
                _fail(name, ("create", "write", "fsync"), errno.EIO, sqlite3.SQLITE_IOERR)
            case "full":
                _fail(name, ("create", "write"), errno.ENOSPC, sqlite3.SQLITE_FULL)
        return plan.kind

    def lose_unsynced(self) -> None:
        """Power is gone: of what was not synced, anything may be left."""
        for descriptor, synced in self.synced.items():
            written = os.fstat(descriptor).st_size
            if written > synced:
                size = self.random.randint(synced, written)
                os.ftruncate(descriptor, size)
                if size > synced and self.random.random() < 0.5:
                    os.pwrite(descriptor, b"\0", self.random.randint(synced, size - 1))


def _fail(name: str, failing: tuple[str, ...], number: int, code: int) -> None:
    """Raise the error of the disk, or of SQLite, at a step that can have it."""
    if name in failing:
        raise OSError(number, os.strerror(number))
    if name == "transaction":
        raise sqlite_error(os.strerror(number), code)


def sqlite_error(text: str, code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return error


class FaultyOs:
    """A fake `os` for the modules of the buffer that write: the real one with steps around it."""

    def __init__(self, disk: Callable[[], Disk | None]) -> None:
        self._disk = disk

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        disk = self._disk()
        if disk is not None and flags & os.O_CREAT:
            disk.step("create")
            if disk.is_full and disk.random.random() < 0.5:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        descriptor = os.open(path, flags, mode)
        if disk is not None and flags & os.O_CREAT:
            disk.synced[descriptor] = 0
        return descriptor

    def close(self, descriptor: int) -> None:
        disk = self._disk()
        if disk is not None:
            disk.synced.pop(descriptor, None)
        os.close(descriptor)

    def pwritev(self, descriptor: int, pieces: list[memoryview], offset: int) -> int:
        """Now and then a short one."""
        disk = self._disk()
        content = b"".join(pieces)
        if disk is None:
            return os.pwrite(descriptor, content, offset)
        try:
            is_short = disk.step("write") == "short" or disk.random.random() < 0.1
            if disk.is_full and disk.random.random() < 0.7:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.pwrite(descriptor, content[: len(content) // 2], offset)
            raise
        length = disk.random.randrange(1, len(content)) if is_short and len(content) > 1 else None
        written = os.pwrite(descriptor, content[:length], offset)
        disk.step("written")
        return written

    def fdatasync(self, descriptor: int) -> None:
        disk = self._disk()
        if disk is None:
            return
        disk.step("fsync")
        disk.synced[descriptor] = os.fstat(descriptor).st_size
        disk.step("fsynced")

    def link(self, source: Path, target: Path) -> None:
        disk = self._disk()
        if disk is not None:
            disk.step("link")
        os.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        disk = self._disk()
        if disk is not None:
            disk.step("rename")
        os.rename(source, target)

    def fsync(self, _: int) -> None:
        """The simulated disks lose only what segments have not synced."""


@contextmanager
def faulty(disk: Callable[[], Disk | None]) -> Iterator[None]:
    """Put the fake disk under the buffer's modules; `disk()` is that of the running process."""
    fake = FaultyOs(disk)
    write, insert = Ledger.write, Ledger._insert
    check, delete = Ownership.check, Segments.delete

    def faulty_write(self: Ledger, *arguments: Any) -> None:
        _transaction(disk(), self, lambda: write(self, *arguments))

    def faulty_insert(self: Ledger, *arguments: Any) -> Any:
        result = insert(self, *arguments)
        _step(disk(), "inserted")
        return result

    def faulty_check(self: Ownership) -> None:
        check(self)
        _step(disk(), "checked")

    def faulty_delete(self: Segments, segment: str) -> None:
        _step(disk(), "delete")
        delete(self, segment)

    with (
        mock.patch.object(segments, "os", fake),
        mock.patch.object(owner, "os", fake),
        mock.patch.object(Ledger, "write", faulty_write),
        mock.patch.object(Ledger, "_insert", faulty_insert),
        mock.patch.object(Ownership, "check", faulty_check),
        mock.patch.object(Segments, "delete", faulty_delete),
    ):
        yield


def _step(disk: Disk | None, name: str) -> None:
    if disk is not None:
        disk.step(name)


def _transaction(disk: Disk | None, ledger: Ledger, write: Callable[[], None]) -> None:
    if disk is None:
        write()
        return
    if disk.is_full and disk.random.random() < 0.7:
        raise sqlite_error("database or disk is full", sqlite3.SQLITE_FULL)
    disk.step("transaction")
    is_last = disk.plan is not None and disk.plan.num_steps == 2
    log = _log_path(ledger) if is_last else None
    before = log.read_bytes() if log is not None and log.exists() else b""
    write()
    try:
        disk.step("committed")
    except Killed as killed:
        if log is not None and not killed.has_power:
            _tear(log, before, disk.random)
        raise


def _log_path(ledger: Ledger) -> Path:
    path = ledger._db.execute("PRAGMA database_list").fetchone()[2]
    return Path(path + "-wal")


def _tear(log: Path, before: bytes, random: random.Random) -> None:
    """The power failed in the middle of the transaction's own sync."""
    after = log.read_bytes()
    if len(after) > len(before) and after.startswith(before):
        os.truncate(log, random.randint(len(before), len(after)))


def keep_ledger(directory: Path, close: Callable[[], None]) -> None:
    """Let go of the files as a killed process does: SQLite would tidy up when it closes."""
    files = {path: path.read_bytes() for path in directory.glob(f"{LEDGER}*")}
    close()
    for path in directory.glob(f"{LEDGER}*"):
        path.unlink()
    for path, content in files.items():
        path.write_bytes(content)


class Stoppable:
    """Runs one piece of a process in a thread, which may stop half way while the world goes on."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._is_killed = False
        self.is_done = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Returns when the piece is done or stopped."""
        self._thread.start()
        self._wait()

    def go_on(self, *, is_killed: bool = False) -> None:
        self._is_killed = is_killed
        self._go.release()
        self._wait()

    def stop(self) -> None:
        """Called by the piece itself. Raises Killed when it is ended instead of resumed."""
        self._back.release()
        self._go.acquire()
        if self._is_killed:
            raise Killed(has_power=True)

    def _wait(self) -> None:
        self._back.acquire()
        if self.is_done:
            self._thread.join()

    def _run(self) -> None:
        self._action()
        self.is_done = True
        self._back.release()
