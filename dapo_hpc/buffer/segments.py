"""Payload records in append-only files: few large files, because parallel file systems dislike many
small ones.

A record is a header (magic, length, sha256) and its bytes. Segments lie beside the ledger of their
incarnation, which appends only to segments that carry its number in their name. Those of its
predecessors it holds by hard links of its own, so that no predecessor can take them away.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import struct
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dapo_hpc.run_dir import fsync_directory

MAGIC = b"DPR1"
HEADER = struct.Struct("<4sQ32s")
SEGMENT_BYTES = 64 * 2**20
"""A new file is begun above this size. Deleting one of 256 MiB held up everybody for 60 ms."""
MAX_PIECES = os.sysconf("SC_IOV_MAX")
"""That one call may write."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class PayloadCorrupt(Exception):
    """A record is not what was written: the disk or somebody changed it. Do not train on it."""


@dataclass(frozen=True, slots=True)
class Record:
    """Content that is hashed when it arrives, and never again before it is read."""

    content: bytes
    sha256: bytes

    @classmethod
    def of(cls, content: bytes) -> Record:
        return cls(content, hashlib.sha256(content).digest())


@dataclass(frozen=True, slots=True)
class Location:
    segment: str
    offset: int
    """Of the content, behind the header."""
    length: int
    sha256: bytes


class Segments:
    """The segment files of a buffer; appends go to files of this incarnation.

    One thread writes; any thread reads.
    """

    def __init__(
        self, directory: Path, incarnation: int, *, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._incarnation = incarnation
        self._segment_bytes = segment_bytes
        self._number = 0
        self._size = 0
        self._good_size = 0
        self._descriptors: dict[str, int] = {}
        self._reading = threading.Lock()
        self.current = ""
        """The file that is appended to; none before the first record."""

    def begin_group(self) -> None:
        """Records appended from here on lie in one file, and `take_back` removes them together.

        Raises OSError, ENOSPC included: nothing has changed.
        """
        if not self.current or self._size >= self._segment_bytes:
            self._begin_segment()
        self._good_size = self._size

    def append(self, records: Iterable[Record]) -> list[Location]:
        """Write records; durable after `sync`. Raises OSError, ENOSPC included."""
        places: list[Location] = []
        pieces: list[bytes] = []
        end = self._size
        for record in records:
            place = Location(self.current, end + HEADER.size, len(record.content), record.sha256)
            pieces += [HEADER.pack(MAGIC, place.length, place.sha256), record.content]
            places.append(place)
            end = place.offset + place.length
        self._write(pieces)
        return places

    def sync(self) -> None:
        """Make the records of a group durable. After an OSError here nothing can be trusted: exit.

        They do not stay in memory: they are read once, by the learner, and the memory of the group
        before is the cheapest to write the next one to.
        """
        descriptor = self._descriptors[self.current]
        os.fdatasync(descriptor)
        length = self._size - self._good_size
        os.posix_fadvise(descriptor, self._good_size, length, os.POSIX_FADV_DONTNEED)

    def take_back(self) -> None:
        """Truncate to the size at `begin_group`."""
        os.ftruncate(self._descriptors[self.current], self._good_size)
        self._size = self._good_size

    def read(self, location: Location) -> bytes:
        """The content of a record. Raises PayloadCorrupt when its hash differs."""
        with self._reading:
            descriptor = self._descriptor(location.segment)
            content = os.pread(descriptor, location.length, location.offset)
        if hashlib.sha256(content).digest() != location.sha256:
            raise PayloadCorrupt(
                f"record at {location.segment}:{location.offset} ({location.length} bytes, "
                f"{len(content)} read) does not have the hash in the ledger."
            )
        return content

    def size(self, segment: str) -> int:
        """Bytes on disk; 0 for a missing file."""
        path = self._directory / segment
        return path.stat().st_size if path.exists() else 0

    def cut(self, segment: str, size: int) -> int:
        """Remove what lies behind `size`. Returns the bytes removed; 0 for a missing file."""
        extra = self.size(segment) - size
        if extra > 0:
            os.truncate(self._directory / segment, size)
        return max(0, extra)

    def names(self) -> list[str]:
        """All segment files, oldest first."""
        return sorted(path.name for path in self._directory.glob("*.seg"))

    def delete(self, segment: str) -> None:
        """Remove a file none of whose records is needed."""
        with self._reading:
            descriptor = self._descriptors.pop(segment, None)
            if descriptor is not None:
                os.close(descriptor)
        (self._directory / segment).unlink(missing_ok=True)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _write(self, pieces: list[bytes]) -> None:
        """In as few calls as can be: after each, the thread queues for the interpreter again."""
        left = deque(memoryview(piece) for piece in pieces)
        while left:
            some = list(itertools.islice(left, MAX_PIECES))
            written = os.pwritev(self._descriptors[self.current], some, self._size)
            self._size += written
            while left and written >= len(left[0]):
                written -= len(left.popleft())
            if written:
                left[0] = left[0][written:]

    def _begin_segment(self) -> None:
        self._number += 1
        name = f"{self._incarnation:06d}-{self._number:06d}.seg"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        descriptor = os.open(self._directory / name, flags, 0o600)
        try:
            fsync_directory(self._directory)
        except OSError:
            os.close(descriptor)
            raise
        self._descriptors[name] = descriptor
        self.current = name
        self._size = self._good_size = 0

    def _descriptor(self, segment: str) -> int:
        if segment not in self._descriptors:
            self._descriptors[segment] = os.open(self._directory / segment, os.O_RDONLY)
        return self._descriptors[segment]
