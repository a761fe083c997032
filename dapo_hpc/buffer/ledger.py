"""The list of events on disk: SQLite, owned by one process, durable at every commit.

EXCLUSIVE locking is set before WAL, so that there is no shared-memory file, which network file
systems cannot offer; a second opener is refused by SQLite itself.

SQLite keeps no checksums of its pages. So each row carries one of its content, those of events are
chained, and the last link is kept: a changed, lost or moved row is noticed when the ledger opens.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dapo_hpc.buffer import wal
from dapo_hpc.buffer.segments import Location

FILE = "ledger.sqlite"
FORMAT = 2
"""Of the rows and of what is encoded in them; +1 with every change an older program cannot read."""
NO_DAMAGE = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL)
"""Errors that say nothing about what the file holds."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY, body BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS records (
    record_id INTEGER PRIMARY KEY, segment TEXT NOT NULL, start INTEGER NOT NULL,
    length INTEGER NOT NULL, sha256 BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS snapshot (
    id INTEGER PRIMARY KEY CHECK (id = 1), body BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS seal (id INTEGER PRIMARY KEY CHECK (id = 1), crc INTEGER NOT NULL);
"""


class Ledger:
    """Events since the last snapshot, the snapshot, and where each payload record lies."""

    def __init__(self, directory: Path) -> None:
        """Open or create.

        Raises sqlite3.OperationalError when another process holds it, ValueError when it is
        damaged or of another format.
        """
        self._path = directory / FILE
        cause = wal.damage(directory / f"{FILE}-wal")
        if cause is not None:
            raise self._damage(cause)
        with self._reading():
            self._db = sqlite3.connect(
                self._path, isolation_level=None, check_same_thread=False, timeout=0
            )
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._require_format()
            self._db.executescript(_SCHEMA)
            self._db.execute("BEGIN EXCLUSIVE")
            self._db.execute("COMMIT")
            self._require(self._db.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
            self._crc = self._verified()

    def _require_format(self) -> None:
        """Raises ValueError for the ledger of another version; a new one is marked as ours."""
        (num_tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (found,) = self._db.execute("PRAGMA user_version").fetchone()
        if num_tables == 0:
            self._db.execute(f"PRAGMA user_version = {FORMAT}")
        elif found != FORMAT:
            raise ValueError(
                f"{self._path} has format {found}; this version of dapo_hpc reads format "
                f"{FORMAT}. Go on with the version that began the run (its env.json names it), or "
                "start a new run from the last published weights."
            )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turns what SQLite and the rows may say of damage into one sentence."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode in NO_DAMAGE:
                raise
            raise self._damage(error) from error
        except (sqlite3.Error, TypeError, OverflowError) as error:
            raise self._damage(error) from error

    def _damage(self, cause: object) -> ValueError:
        return ValueError(
            f"{self._path} is damaged ({cause}): it is not what the buffer wrote. Restore it, with "
            f"{FILE}-wal, from a copy of the same moment as the segments; this run's buffer "
            "cannot be continued without it."
        )

    def _require(self, is_sound: bool) -> None:
        if not is_sound:
            raise self._damage("a checksum differs")

    def _verified(self) -> int:
        """The last link of the chain, after every row was checked."""
        crc = 0
        for body, noted in self._db.execute("SELECT body, crc FROM snapshot"):
            crc = zlib.crc32(body)
            self._require(crc == noted)
        for body, noted in self._db.execute("SELECT body, crc FROM events ORDER BY seq"):
            crc = zlib.crc32(body, crc)
            self._require(crc == noted)
        seal = self._db.execute("SELECT crc FROM seal").fetchone()
        self._require(crc == (0 if seal is None else seal[0]))
        for row in self._db.execute(
            "SELECT record_id, segment, start, length, sha256, crc FROM records"
        ):
            self._require(row[-1] == _record_crc(row[0], Location(*row[1:5])))
        return crc

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
            crc = self._insert(events, locations, freed, snapshot)
            self._db.execute("COMMIT")
        except sqlite3.Error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self._crc = crc

    def _insert(
        self,
        events: Iterable[bytes],
        locations: dict[int, Location],
        freed: Iterable[int],
        snapshot: bytes | None,
    ) -> int:
        """Returns the new last link of the chain."""
        if snapshot is None:
            rows, crc = _chained(events, self._crc)
            self._db.executemany("INSERT INTO events (body, crc) VALUES (?, ?)", rows)
        else:
            crc = zlib.crc32(snapshot)
            self._db.execute("DELETE FROM events")
            self._db.execute("INSERT OR REPLACE INTO snapshot VALUES (1, ?, ?)", (snapshot, crc))
        if crc != self._crc:
            self._db.execute("INSERT OR REPLACE INTO seal VALUES (1, ?)", (crc,))
        self._db.executemany(
            "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?)",
            (
                (i, x.segment, x.offset, x.length, x.sha256, _record_crc(i, x))
                for i, x in locations.items()
            ),
        )
        self._db.executemany("DELETE FROM records WHERE record_id = ?", ((i,) for i in freed))
        return crc

    def close(self) -> None:
        self._db.close()


def _chained(events: Iterable[bytes], crc: int) -> tuple[list[tuple[bytes, int]], int]:
    """Rows of (body, link), and the last link."""
    rows = []
    for body in events:
        crc = zlib.crc32(body, crc)
        rows.append((body, crc))
    return rows, crc


def _record_crc(record_id: int, place: Location) -> int:
    text = f"{record_id} {place.segment} {place.offset} {place.length} "
    return zlib.crc32(place.sha256, zlib.crc32(text.encode()))
