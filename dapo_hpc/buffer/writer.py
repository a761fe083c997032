"""The one thread that writes, and what it writes to. A reply goes out after its group is on disk.

Order of a group commit: owner still the newest, records appended, fdatasync, ledger transaction,
owner still the newest, unused segments deleted, replies. Replies leave in the order of the
requests, so that none shows what could still be lost.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from dapo_hpc.buffer.ledger import Ledger
from dapo_hpc.buffer.segments import HEADER, NO_SPACE, Location, PayloadCorrupt, Record, Segments

log = logging.getLogger(__name__)

GATHER_S = 0.005
"""Least time between the starts of two group commits; a lone request never waits for it."""
FULL_RETRY_S = 1.0
"""Between two attempts while the disk is full."""
GROUP_BYTES = 4 * 2**20
"""Of payload in one group commit, the request that exceeds it included: a heartbeat waits for the
commit under way, and for its own."""
LOG_EVERY = 30
"""Attempts from one line in the log to the next."""
SPARSE_FRAC = 0.25
"""A segment of whose bytes no more than this share is needed is rewritten."""
MOVED_BYTES = 2**20
"""Of records rewritten in one group commit, the one that exceeds it included."""
DATA_LOST = "The file system lost data; this run's buffer cannot be continued."


class DiskFull(Exception):
    """Nothing of the group was kept; it can be tried again."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one request must have on disk before its reply."""

    events: list[bytes]
    payloads: dict[int, Record]
    freed: list[int]
    snapshot: bytes | None
    """Of the state behind all events up to this job, these included."""
    done: Callable[[], None]

    @classmethod
    def nothing(cls) -> Job:
        """Has the writer look whether there is a newer owner, and nothing else."""
        return cls(events=[], payloads={}, freed=[], snapshot=None, done=_nothing)

    @property
    def is_empty(self) -> bool:
        return not (self.events or self.payloads or self.freed or self.snapshot)

    @property
    def num_bytes(self) -> int:
        """Of its payloads."""
        return sum(len(record.content) for record in self.payloads.values())


def _nothing() -> None:
    """Nobody waits."""


class Store:
    """Ledger and segments behind one `write` and one `read`."""

    def __init__(self, ledger: Ledger, segments: Segments) -> None:
        self._ledger = ledger
        self._segments = segments
        self._locations = ledger.locations()
        self._live: Counter[str] = Counter()
        """Bytes of records that are needed, their headers included, by segment."""
        self._count_live(self._locations.values(), 1)
        self.unwritten: dict[int, Record] = {}
        """Payloads handed to the writer that are not on disk yet."""
        self._to_move: list[int] = []
        """Records of a sparse segment that go to the newest."""

    def read(self, record_id: int) -> bytes:
        """Any thread. Raises KeyError for a freed record, PayloadCorrupt for a damaged one."""
        while True:
            record = self.unwritten.get(record_id)
            if record is not None:
                return record.content
            place = self._locations[record_id]
            try:
                return self._segments.read(place)
            except (OSError, PayloadCorrupt):
                if self._locations.get(record_id) == place:
                    raise
                # it was moved between the two lines above

    def recover(self) -> None:
        """After opening: cut what a predecessor began to write, and look at what it wrote last.

        Raises ValueError when a record that the ledger calls durable is not there.
        """
        ends: Counter[str] = Counter()
        for place in self._locations.values():
            ends[place.segment] = max(ends[place.segment], place.offset + place.length)
        for segment, end in ends.items():
            size = self._segments.size(segment)
            if size < end:
                raise ValueError(
                    f"segment {segment} ends at byte {size}, but the ledger says that records up "
                    f"to byte {end} are durable. {DATA_LOST}"
                )
        for segment in self._segments.names():
            if segment not in ends:
                self._segments.delete(segment)
        newest = max(ends, default="")
        if extra := self._segments.cut(newest, ends[newest]) if newest else 0:
            log.warning("removed %d bytes of an unfinished write from %s.", extra, newest)
        self._verify(newest)

    def _verify(self, segment: str) -> None:
        """Read what was written last: an error at fsync may have left it out."""
        for record_id, place in self._locations.items():
            if place.segment == segment:
                try:
                    self._segments.read(place)
                except PayloadCorrupt as error:
                    raise ValueError(
                        f"record {record_id}, which the ledger calls durable, is damaged: {error} "
                        f"{DATA_LOST}"
                    ) from error

    def write(self, jobs: list[Job]) -> None:
        """Make a group durable; only the last job may carry a snapshot.

        Raises:
            DiskFull: nothing was kept; try again.
            OSError, sqlite3.Error: what is on disk is unknown; exit, never retry.
        """
        payloads = {k: v for job in jobs for k, v in job.payloads.items()}
        freed = [record_id for job in jobs for record_id in job.freed]
        events = [event for job in jobs for event in job.events]
        if jobs[-1].snapshot is not None and not self._to_move:
            self._to_move = self._sparse_records()
        moved = self._moved(set(freed))
        locations = self._append(payloads | moved)
        try:
            self._ledger.write(events, locations, freed, jobs[-1].snapshot)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
            if locations:
                self._segments.take_back()
            raise DiskFull(str(error)) from error
        self._to_move = [record_id for record_id in self._to_move if record_id not in moved]
        self._count_live((self._locations[record_id] for record_id in moved), -1)
        self._locations.update(locations)
        self._count_live(locations.values(), 1)
        for record_id in payloads:
            self.unwritten.pop(record_id, None)
        self._count_live((self._locations.pop(record_id) for record_id in freed), -1)

    def delete_unused(self) -> None:
        """Remove segments that no record lies in.

        Only once it is sure that no successor copied an older ledger, which may need them.
        """
        for segment in [segment for segment, num_bytes in self._live.items() if num_bytes == 0]:
            if segment != self._segments.current:
                self._segments.delete(segment)
                del self._live[segment]

    def close(self) -> None:
        self._ledger.close()
        self._segments.close()

    def _append(self, payloads: dict[int, Record]) -> dict[int, Location]:
        if not payloads:
            return {}
        try:
            self._segments.begin_group()
        except OSError as error:
            raise _full_or(error) from error
        try:
            places = self._segments.append(payloads.values())
        except OSError as error:
            full = _full_or(error)
            self._segments.take_back()
            raise full from error
        self._segments.sync()
        return dict(zip(payloads, places, strict=True))

    def _sparse_records(self) -> list[int]:
        """What is still needed of the emptiest segment, if that is little: it moves to the newest.

        One long-lived record would otherwise keep a whole file on disk.
        """
        shares = {
            segment: num_bytes / max(1, self._segments.size(segment))
            for segment, num_bytes in self._live.items()
            if num_bytes and segment != self._segments.current
        }
        emptiest = min(shares, key=lambda segment: shares[segment], default="")
        if not emptiest or shares[emptiest] > SPARSE_FRAC:
            return []
        return [k for k, place in self._locations.items() if place.segment == emptiest]

    def _moved(self, freed: set[int]) -> dict[int, Record]:
        """The next of them, and no more than a group commit has time for."""
        self._to_move = [k for k in self._to_move if k in self._locations and k not in freed]
        moved: dict[int, Record] = {}
        num_bytes = 0
        for record_id in self._to_move:
            if num_bytes >= MOVED_BYTES:
                break
            place = self._locations[record_id]
            moved[record_id] = Record(self._segments.read(place), place.sha256)
            num_bytes += place.length
        return moved

    def _count_live(self, places: Iterable[Location], sign: int) -> None:
        for place in places:
            self._live[place.segment] += sign * (HEADER.size + place.length)


def _full_or(error: OSError) -> Exception:
    return DiskFull(str(error)) if error.errno in NO_SPACE else error


class Writer(threading.Thread):
    """Takes jobs in order, writes them in groups, then lets their replies go."""

    def __init__(
        self,
        store: Store,
        check_owner: Callable[[], None],
        on_fatal: Callable[[BaseException], None],
        *,
        full_mark: Path,
    ) -> None:
        """`full_mark`: an empty file that exists while the disk is full."""
        super().__init__(name="buffer-writer", daemon=True)
        self._store = store
        self._full_mark = full_mark
        self._check_owner = check_owner
        self._on_fatal = on_fatal
        self._jobs: deque[Job] = deque()
        self._queued_bytes = 0
        self._changed = threading.Condition(threading.RLock())
        self._is_stopping = False
        self._last_commit_s = 0.0

    def put(self, job: Job) -> None:
        """Queue a job; its `done` is called from the writer's thread."""
        self._store.unwritten.update(job.payloads)
        with self._changed:
            self._jobs.append(job)
            self._queued_bytes += job.num_bytes
            self._changed.notify()

    def stop(self) -> None:
        """Write what is queued, then end the thread."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self.join()

    def run(self) -> None:
        self._unmark()  # a predecessor may have been killed while it waited
        try:
            while jobs := self._next_group():
                self._commit(jobs)
                for job in jobs:
                    job.done()
        except Exception as error:  # the top of a thread: the process must not go on
            self._on_fatal(error)

    def take(self) -> list[Job]:
        """What is queued, up to the first snapshot or GROUP_BYTES of payload; does not wait."""
        jobs: list[Job] = []
        num_bytes = 0
        with self._changed:
            while self._jobs and num_bytes < GROUP_BYTES and not (jobs and jobs[-1].snapshot):
                jobs.append(self._jobs.popleft())
                num_bytes += jobs[-1].num_bytes
            self._queued_bytes -= num_bytes
        return jobs

    def attempt(self, jobs: list[Job]) -> None:
        """Try once to make a group durable; afterwards its replies may go.

        Raises DiskFull: try again. Anything else: exit.
        """
        self._check_owner()
        if all(job.is_empty for job in jobs):
            return
        self._store.write(jobs)
        self._check_owner()
        self._store.delete_unused()

    def _next_group(self) -> list[Job]:
        """Wait for jobs; empty when stopping."""
        with self._changed:
            while not self._jobs and not self._is_stopping:
                self._changed.wait()
            if not all(job.is_empty for job in self._jobs):
                self._gather()
            return self.take()

    def _gather(self) -> None:
        """In a burst, let more requests join the group, unless it is full."""
        until = self._last_commit_s + GATHER_S
        while not self._is_stopping and self._queued_bytes < GROUP_BYTES:
            left_s = until - time.monotonic()
            if left_s <= 0:
                break
            self._changed.wait(left_s)
        self._last_commit_s = time.monotonic()

    def _commit(self, jobs: list[Job]) -> None:
        """Repeat `attempt` for as long as the disk is full."""
        attempt = 1
        while True:
            try:
                self.attempt(jobs)
                break
            except DiskFull as error:
                self._note_full(error, attempt, len(jobs))
                attempt += 1
                time.sleep(FULL_RETRY_S)
        if attempt > 1:
            self._note_space()

    def _note_full(self, error: DiskFull, attempt: int, num_waiting: int) -> None:
        """Say so: in the log, and to `dapo status` by a file that needs no space."""
        if attempt % LOG_EVERY == 1:
            log.error(
                "the disk of the run directory is full (%s, attempt %d); %d requests wait, "
                "nothing is acknowledged. Free space; next attempt in %.0f s.",
                error, attempt, num_waiting, FULL_RETRY_S,
            )  # fmt: skip
        if attempt == 1:
            with contextlib.suppress(OSError):
                self._full_mark.touch()

    def _note_space(self) -> None:
        log.warning("there is space on the disk of the run directory again; going on.")
        self._unmark()

    def _unmark(self) -> None:
        with contextlib.suppress(OSError):
            self._full_mark.unlink(missing_ok=True)
