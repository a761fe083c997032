"""Experiments of two nodes with one shared directory and the network between them.

Both run the same functions with their own rank; each says and hears through files, which is
already the first experiment.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_hpc.run_dir import write_json

POLL_S = 0.01
NUM_LINKS = 20
NUM_SIGHTS = 5
NUM_FSYNCS = 20
PAGE = b"x" * 4096


class Unheard(Exception):
    """The other node's file did not become visible in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    directory: Path
    """On the shared file system."""
    rank: int
    world: int
    patience_s: float = 60.0
    """For each thing that the other node has to do."""

    @property
    def other(self) -> int:
        return 1 - self.rank

    def say(self, name: str, value: Any) -> None:
        """Replace `name-RANK.json` durably and atomically."""
        write_json(self.directory / f"{name}-{self.rank}.json", value)

    def hear(self, name: str, *, unlike: Any = None) -> Any:
        """The other's latest word, once it is there and differs from `unlike`."""
        path = self.directory / f"{name}-{self.other}.json"
        deadline = time.monotonic() + self.patience_s
        while time.monotonic() < deadline:
            try:
                value = json.loads(path.read_text())
            except FileNotFoundError:
                value = unlike
            if value != unlike:
                return value
            time.sleep(POLL_S)
        raise Unheard(
            f"{path.name}, which the other node wrote, was not to be seen for {self.patience_s:g} s"
        )


def sight_s(meeting: Meeting) -> list[float]:
    """Seconds until a replaced file is seen: half of there and back. By one clock, rank 0's."""
    seen = []
    for number in range(1, NUM_SIGHTS + 1):
        if meeting.rank == 0:
            began = time.monotonic()
            meeting.say("sight", number)
            meeting.hear("sight", unlike=number - 1 or None)
            seen.append((time.monotonic() - began) / 2)
        else:
            meeting.hear("sight", unlike=number - 1 or None)
            meeting.say("sight", number)
    return seen


def links_won(meeting: Meeting) -> list[int]:
    """Both try to make the same hard links at the same time; the numbers that this one made."""
    mine = meeting.directory / f"link-{meeting.rank}"
    mine.write_text(str(meeting.rank))
    meeting.say("ready", 1)
    meeting.hear("ready")
    won = []
    for number in range(NUM_LINKS):
        try:
            os.link(mine, meeting.directory / f"owner.{number}")
        except FileExistsError:
            continue
        won.append(number)
    return won


def fsync_s(directory: Path, rank: int) -> list[float]:
    """Seconds of appending 4 KiB and making them durable."""
    took = []
    with (directory / f"fsync-{rank}").open("wb") as file:
        for _ in range(NUM_FSYNCS):
            began = time.monotonic()
            file.write(PAGE)
            file.flush()
            os.fsync(file.fileno())
            took.append(time.monotonic() - began)
    return took


def write_ledger(path: Path) -> None:
    """A SQLite database as the buffer keeps it: one owner, WAL, every commit on disk."""
    ledger = sqlite3.connect(path, isolation_level=None)
    try:
        ledger.execute("PRAGMA locking_mode=EXCLUSIVE")
        mode = ledger.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            raise sqlite3.OperationalError(f"journal_mode is {mode}, not wal")
        ledger.execute("PRAGMA synchronous=FULL")
        ledger.execute("CREATE TABLE events (number INTEGER)")
        for number in range(20):
            ledger.execute("INSERT INTO events VALUES (?)", (number,))
    finally:
        ledger.close()


def read_ledger(path: Path) -> None:
    """The same database on the other node: whole, with every row."""
    ledger = sqlite3.connect(path, isolation_level=None)
    try:
        if ledger.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("quick_check failed")
        (rows,) = ledger.execute("SELECT count(*) FROM events").fetchone()
        if rows != 20:
            raise sqlite3.DatabaseError(f"{rows} rows of 20 are there")
    finally:
        ledger.close()


class Clock:
    """Answers every connection with this node's time, until closed."""

    def __init__(self, ports: tuple[int, int] | None) -> None:
        self._socket = _listen(ports)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.sendall(repr(time.time()).encode())

    def close(self) -> None:
        # Without shutdown the thread would stay in accept.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _listen(ports: tuple[int, int] | None) -> socket.socket:
    for port in range(ports[0], ports[1] + 1) if ports else (0,):
        try:
            return socket.create_server(("", port))
        except OSError:
            continue
    raise OSError(f"no free port in network.port_range {list(ports or ())}")


def ask_time(address: str, port: int, *, within_s: float = 3.0) -> float:
    """How far the clock at that address is ahead of ours, in seconds."""
    began = time.time()
    with socket.create_connection((address, port), timeout=within_s) as connection:
        said = float(connection.recv(64))
    return said - (began + time.time()) / 2
