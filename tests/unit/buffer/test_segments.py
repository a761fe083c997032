"""Payload files: what was synced is there, what was torn is cut, what was changed is noticed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dapo_hpc.buffer.segments import HEADER, PayloadCorrupt, Segments, cut_torn_tail

CONTENTS = [b"first", b"", b"x" * 10_000, b"last"]


@pytest.fixture
def segment(tmp_path: Path) -> Path:
    """One file with CONTENTS."""
    segments = Segments(tmp_path, 1)
    segments.begin_group()
    for content in CONTENTS:
        segments.append(content)
    segments.sync()
    segments.close()
    return tmp_path / "000001-000001.seg"


def ends() -> list[int]:
    """File size behind each record."""
    sizes = [HEADER.size + len(content) for content in CONTENTS]
    return [sum(sizes[: i + 1]) for i in range(len(sizes))]


def test_records_are_read_back(tmp_path: Path) -> None:
    segments = Segments(tmp_path, 1)
    places = [segments.append(content) for content in CONTENTS]
    segments.sync()
    assert [segments.read(place) for place in places] == CONTENTS


@pytest.mark.parametrize("lost", [1, 3, 4, 5, 4 + HEADER.size, 5 + HEADER.size, 9_000])
def test_a_torn_tail_is_cut_at_a_record(segment: Path, lost: int) -> None:
    size = segment.stat().st_size
    os.truncate(segment, size - lost)
    cut_torn_tail(segment)
    assert segment.stat().st_size == max(end for end in [0, *ends()] if end <= size - lost)


def test_a_whole_file_is_left_alone(segment: Path) -> None:
    before = segment.read_bytes()
    assert cut_torn_tail(segment) == 0
    assert segment.read_bytes() == before


def test_a_tail_of_the_right_length_with_wrong_bytes_is_cut(segment: Path) -> None:
    """A power failure may leave a file of full size whose last block was never written."""
    with open(segment, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\0\0")
    cut_torn_tail(segment)
    assert segment.stat().st_size == ends()[-2]


def test_a_changed_record_is_noticed(tmp_path: Path) -> None:
    segments = Segments(tmp_path, 1)
    place = segments.append(b"content")
    segments.sync()
    with open(tmp_path / place.segment, "r+b") as file:
        file.seek(place.offset)
        file.write(b"C")
    with pytest.raises(PayloadCorrupt, match="does not have the hash"):
        segments.read(place)


def test_a_group_can_be_taken_back(tmp_path: Path) -> None:
    segments = Segments(tmp_path, 1)
    kept = segments.append(b"kept")
    segments.begin_group()
    segments.append(b"lost")
    segments.take_back()
    again = segments.append(b"again")
    assert again.offset == kept.offset + 4 + HEADER.size
    assert [segments.read(kept), segments.read(again)] == [b"kept", b"again"]


def test_files_are_rolled_between_groups(tmp_path: Path) -> None:
    segments = Segments(tmp_path, 3, segment_bytes=20)
    names = []
    for _ in range(3):
        segments.begin_group()
        names += [segments.append(b"a" * 30).segment, segments.append(b"b").segment]
    assert names == [f"000003-{n:06d}.seg" for n in (1, 1, 2, 2, 3, 3)]
