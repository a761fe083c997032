"""Payload records in append-only files: few large files, because parallel file systems dislike many
small ones.

A record is a header (magic, length, sha256) and its bytes. Only the process that owns the buffer
appends, always to segments that carry its incarnation in their name.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from dapo_hpc.run_dir import fsync_directory

MAGIC = b"DPR1"
HEADER = struct.Struct("<4sQ32s")
SEGMENT_BYTES = 256 * 2**20
"""A new file is begun above this size."""


class PayloadCorrupt(Exception):
    """A record is not what was written: the disk or somebody changed it. Do not train on it."""


@dataclass(frozen=True, slots=True)
class Location:
    segment: str
    offset: int
    """Of the content, behind the header."""
    length: int
    sha256: bytes


class Segments:
    """The segment files of a buffer; appends go to files of this incarnation."""

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
        self.current = ""
        self._begin_segment()

    def begin_group(self) -> None:
        """Records appended from here on can be taken back together by `take_back`."""
        if self._size >= self._segment_bytes:
            self._begin_segment()
        self._good_size = self._size

    def append(self, content: bytes) -> Location:
        """Write one record; durable after `sync`. Raises OSError, ENOSPC included."""
        digest = hashlib.sha256(content).digest()
        offset = self._size + HEADER.size
        self._write(HEADER.pack(MAGIC, len(content), digest))
        self._write(content)
        return Location(self.current, offset, len(content), digest)

    def sync(self) -> None:
        """Make all appended records durable. After an OSError here nothing can be trusted: exit."""
        os.fdatasync(self._descriptors[self.current])

    def take_back(self) -> None:
        """Truncate to the size at `begin_group`."""
        os.ftruncate(self._descriptors[self.current], self._good_size)
        self._size = self._good_size

    def read(self, location: Location) -> bytes:
        """The content of a record. Raises PayloadCorrupt when its hash differs."""
        content = os.pread(self._descriptor(location.segment), location.length, location.offset)
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

    def names(self) -> list[str]:
        """All segment files, oldest first."""
        return sorted(path.name for path in self._directory.glob("*.seg"))

    def delete(self, segment: str) -> None:
        """Remove a file none of whose records is needed."""
        descriptor = self._descriptors.pop(segment, None)
        if descriptor is not None:
            os.close(descriptor)
        (self._directory / segment).unlink(missing_ok=True)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _write(self, content: bytes) -> None:
        view = memoryview(content)
        while view:
            written = os.pwrite(self._descriptors[self.current], view, self._size)
            self._size += written
            view = view[written:]

    def _begin_segment(self) -> None:
        self._number += 1
        self.current = f"{self._incarnation:06d}-{self._number:06d}.seg"
        path = self._directory / self.current
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._descriptors[self.current] = os.open(path, flags, 0o600)
        self._size = self._good_size = 0
        fsync_directory(self._directory)

    def _descriptor(self, segment: str) -> int:
        if segment not in self._descriptors:
            self._descriptors[segment] = os.open(self._directory / segment, os.O_RDONLY)
        return self._descriptors[segment]


def cut_torn_tail(path: Path) -> int:
    """Truncate a segment behind its last whole record. Returns the bytes removed."""
    good, size = 0, path.stat().st_size
    with open(path, "r+b") as file:
        while (end := _record_end(file.read(HEADER.size), good, size)) is not None:
            content = file.read(end - good - HEADER.size)
            file.seek(good)
            if hashlib.sha256(content).digest() != HEADER.unpack(file.read(HEADER.size))[2]:
                break
            file.seek(end)
            good = end
        file.truncate(good)
        os.fsync(file.fileno())
    return size - good


def _record_end(header: bytes, start: int, size: int) -> int | None:
    """Where the record ends that begins at `start`; None when it cannot be whole."""
    if len(header) < HEADER.size:
        return None
    magic, length, _ = HEADER.unpack(header)
    end: int = start + HEADER.size + length
    return end if magic == MAGIC and end <= size else None
