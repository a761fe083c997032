"""Tells a write-ahead log that ends early from one that is damaged in the middle.

SQLite stops at the first frame whose checksum differs, and says nothing. Behind the last whole
commit a killed process may leave the frames of one unfinished transaction, with at most one commit
frame among them, because each commit is on disk before the next begins. More than that means that
something acknowledged would be lost.

Source: sqlite.org/fileformat2.html, section 4, "The Write-Ahead Log".
"""

from __future__ import annotations

import struct
from pathlib import Path

HEADER_BYTES = 32
FRAME_HEADER_BYTES = 24
MAGIC = 0x377F0682
"""The last bit says that the words of the checksums are big-endian."""
MASK = 0xFFFFFFFF


def damage(path: Path) -> str | None:
    """What is wrong with a log, or None. It must not be written meanwhile."""
    content = path.read_bytes() if path.exists() else b""
    if len(content) < HEADER_BYTES:
        return None
    magic, _, page_bytes, _, *salts, first, second = struct.unpack(">8I", content[:HEADER_BYTES])
    words = ">II" if magic & 1 else "<II"
    sums = _summed(words, content[:FRAME_HEADER_BYTES], (0, 0))
    is_page = 512 <= page_bytes <= 65536
    if magic & ~1 != MAGIC or sums != (first, second) or not is_page:
        return "the head of its -wal file is damaged"
    size = FRAME_HEADER_BYTES + page_bytes
    num_frames = (len(content) - HEADER_BYTES) // size
    commits_lost, is_whole = 0, True
    for number in range(num_frames):
        start = HEADER_BYTES + number * size
        frame = content[start : start + size]
        _, num_pages, *noted = struct.unpack(">6I", frame[:FRAME_HEADER_BYTES])
        if is_whole:
            sums = _summed(words, frame[:8], sums)
            sums = _summed(words, frame[FRAME_HEADER_BYTES:], sums)
            is_whole = noted == [*salts, *sums]
        if not is_whole and noted[:2] == salts:
            commits_lost += num_pages > 0
    if commits_lost > 1:
        return f"its -wal file is damaged before {commits_lost - 1} acknowledged commits"
    return None


def _summed(words: str, content: bytes, sums: tuple[int, int]) -> tuple[int, int]:
    first, second = sums
    for even, odd in struct.iter_unpack(words, content):
        first = (first + even + second) & MASK
        second = (second + odd + first) & MASK
    return first, second
