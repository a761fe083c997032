"""The one thread that writes, and what it writes to. A reply goes out after its group is on disk.

Order of a group commit: owner still the newest, records appended, fdatasync, ledger transaction,
owner still the newest, replies. Replies leave in the order of the requests, so that none shows what
could still be lost.
"""

from __future__ import annotations

import errno
import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from dapo_hpc.buffer.ledger import Ledger
from dapo_hpc.buffer.segments import Location, Segments

log = logging.getLogger(__name__)

GATHER_S = 0.02
"""Least time between the starts of two group commits; a lone request never waits for it."""
FULL_RETRY_S = 1.0
"""Between two attempts while the disk is full."""


class DiskFull(Exception):
    """Nothing of the group was kept; it can be tried again."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one request must have on disk before its reply."""

    events: list[bytes]
    payloads: dict[int, bytes]
    freed: list[int]
    snapshot: bytes | None
    """Of the state behind all events up to this job, these included."""
    done: Callable[[], None]

    @property
    def is_empty(self) -> bool:
        return not (self.events or self.payloads or self.freed or self.snapshot)


class Store:
    """Ledger and segments behind one `write` and one `read`."""

    def __init__(self, ledger: Ledger, segments: Segments) -> None:
        self._ledger = ledger
        self._segments = segments
        self._locations = ledger.locations()
        self._live = Counter(location.segment for location in self._locations.values())
        self.unwritten: dict[int, bytes] = {}
        """Payloads handed to the writer that are not on disk yet."""

    def read(self, record_id: int) -> bytes:
        """Any thread. Raises KeyError for a freed record, PayloadCorrupt for a damaged one."""
        content = self.unwritten.get(record_id)
        return self._segments.read(self._locations[record_id]) if content is None else content

    def check_tail(self) -> None:
        """Raises ValueError when a segment is shorter than the ledger says."""
        for record_id, place in self._locations.items():
            if self._segments.size(place.segment) < place.offset + place.length:
                raise ValueError(
                    f"segment {place.segment} ends before record {record_id} at byte "
                    f"{place.offset + place.length}, which the ledger says is durable. The file "
                    "system lost data; this run's buffer cannot be continued."
                )

    def write(self, jobs: list[Job]) -> None:
        """Make a group durable; only the last job may carry a snapshot.

        Raises:
            DiskFull: nothing was kept; try again.
            OSError, sqlite3.Error: what is on disk is unknown; exit, never retry.
        """
        locations = self._append({k: v for job in jobs for k, v in job.payloads.items()})
        freed = [record_id for job in jobs for record_id in job.freed]
        events = [event for job in jobs for event in job.events]
        try:
            self._ledger.write(events, locations, freed, jobs[-1].snapshot)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
            self._segments.take_back()
            raise DiskFull(str(error)) from error
        self._locations.update(locations)
        self._live.update(location.segment for location in locations.values())
        for record_id in locations:
            self.unwritten.pop(record_id, None)
        self._free(freed)

    def _append(self, payloads: dict[int, bytes]) -> dict[int, Location]:
        self._segments.begin_group()
        try:
            locations = {k: self._segments.append(content) for k, content in payloads.items()}
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._segments.take_back()
            raise DiskFull(str(error)) from error
        if locations:
            self._segments.sync()
        return locations

    def _free(self, record_ids: list[int]) -> None:
        """Forget records; a segment that holds no other is deleted."""
        for record_id in record_ids:
            place = self._locations.pop(record_id)
            self._live[place.segment] -= 1
        for segment in {segment for segment, count in self._live.items() if count == 0}:
            if segment != self._segments.current:
                self._segments.delete(segment)
                del self._live[segment]

    def delete_unused(self) -> None:
        """After opening: remove segments that no record lies in."""
        for segment in self._segments.names():
            if segment not in self._live and segment != self._segments.current:
                self._segments.delete(segment)

    def close(self) -> None:
        self._ledger.close()
        self._segments.close()


class Writer(threading.Thread):
    """Takes jobs in order, writes them in groups, then lets their replies go."""

    def __init__(
        self,
        store: Store,
        check_owner: Callable[[], None],
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        super().__init__(name="buffer-writer", daemon=True)
        self._store = store
        self._check_owner = check_owner
        self._on_fatal = on_fatal
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._is_stopping = False
        self._last_commit_s = 0.0

    def put(self, job: Job) -> None:
        """Queue a job; its `done` is called from the writer's thread."""
        self._store.unwritten.update(job.payloads)
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """Write what is queued, then end the thread."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self.join()

    def run(self) -> None:
        try:
            while jobs := self._next_group():
                if not all(job.is_empty for job in jobs):
                    self._commit(jobs)
                for job in jobs:
                    job.done()
        except Exception as error:  # the top of a thread: the process must not go on
            self._on_fatal(error)

    def _next_group(self) -> list[Job]:
        """Everything queued, up to the first snapshot; empty when stopping."""
        with self._changed:
            while not self._jobs and not self._is_stopping:
                self._changed.wait()
            if not all(job.is_empty for job in self._jobs):
                self._gather()
            last = next((i for i, job in enumerate(self._jobs) if job.snapshot), len(self._jobs))
            jobs, self._jobs = self._jobs[: last + 1], self._jobs[last + 1 :]
            return jobs

    def _gather(self) -> None:
        """In a burst, let more requests join the group."""
        until = self._last_commit_s + GATHER_S
        while not self._is_stopping and (left_s := until - time.monotonic()) > 0:
            self._changed.wait(left_s)
        self._last_commit_s = time.monotonic()

    def _commit(self, jobs: list[Job]) -> None:
        self._check_owner()
        attempt = 0
        while True:
            try:
                self._store.write(jobs)
                break
            except DiskFull as error:
                attempt += 1
                if attempt % 30 == 1:
                    log.error(
                        "the disk of the run directory is full (%s, attempt %d); %d requests wait, "
                        "nothing is acknowledged. Free space; next attempt in %.0f s.",
                        error, attempt, len(jobs), FULL_RETRY_S,
                    )  # fmt: skip
                time.sleep(FULL_RETRY_S)
                self._check_owner()
        self._check_owner()
