"""The list of events on disk: SQLite, owned by one process, durable at every commit.

EXCLUSIVE locking is set before WAL, so that there is no shared-memory file, which network file
systems cannot offer; a second opener is refused by SQLite itself.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

from dapo_hpc.buffer.segments import Location

FILE = "ledger.sqlite"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (seq INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS records (
    record_id INTEGER PRIMARY KEY, segment TEXT NOT NULL, start INTEGER NOT NULL,
    length INTEGER NOT NULL, sha256 BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS snapshot (id INTEGER PRIMARY KEY CHECK (id = 1), body BLOB NOT NULL);
"""


class Ledger:
    """Events since the last snapshot, the snapshot, and where each payload record lies."""

    def __init__(self, directory: Path) -> None:
        """Open or create. Raises sqlite3.OperationalError when another process holds it."""
        self._db = sqlite3.connect(
            directory / FILE, isolation_level=None, check_same_thread=False, timeout=0
        )
        self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)
        self._db.execute("BEGIN EXCLUSIVE")
        self._db.execute("COMMIT")

    def snapshot(self) -> bytes | None:
        row = self._db.execute("SELECT body FROM snapshot").fetchone()
        return None if row is None else bytes(row[0])

    def events(self) -> Iterator[bytes]:
        """Bodies behind the snapshot, in order."""
        for (body,) in self._db.execute("SELECT body FROM events ORDER BY seq"):
            yield body

    def locations(self) -> dict[int, Location]:
        rows = self._db.execute("SELECT record_id, segment, start, length, sha256 FROM records")
        return {row[0]: Location(*row[1:]) for row in rows}

    def write(
        self,
        events: Iterable[bytes],
        locations: dict[int, Location],
        freed: Iterable[int],
        snapshot: bytes | None,
    ) -> None:
        """One durable transaction. A snapshot stands for all events, those given here included.

        Raises:
            sqlite3.OperationalError: nothing was written; SQLITE_FULL may be tried again.
        """
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._insert(events, locations, freed, snapshot)
            self._db.execute("COMMIT")
        except sqlite3.Error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _insert(
        self,
        events: Iterable[bytes],
        locations: dict[int, Location],
        freed: Iterable[int],
        snapshot: bytes | None,
    ) -> None:
        if snapshot is None:
            self._db.executemany("INSERT INTO events (body) VALUES (?)", ((e,) for e in events))
        else:
            self._db.execute("DELETE FROM events")
            self._db.execute("INSERT OR REPLACE INTO snapshot VALUES (1, ?)", (snapshot,))
        self._db.executemany(
            "INSERT INTO records VALUES (?, ?, ?, ?, ?)",
            ((i, x.segment, x.offset, x.length, x.sha256) for i, x in locations.items()),
        )
        self._db.executemany("DELETE FROM records WHERE record_id = ?", ((i,) for i in freed))

    def close(self) -> None:
        self._db.close()
