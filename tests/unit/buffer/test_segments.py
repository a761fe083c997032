"""Payload files: what was written is there, what was changed is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_hpc.buffer.segments import HEADER, PayloadCorrupt, Record, Segments

CONTENTS = [b"first", b"", b"x" * 10_000, b"last"]


def test_records_are_read_back(tmp_path: Path) -> None:
    segments = Segments(tmp_path, 1)
    segments.begin_group()
    places = segments.append(map(Record.of, CONTENTS))
    segments.sync()
    assert [segments.read(place) for place in places] == CONTENTS


def test_a_changed_record_is_noticed(tmp_path: Path) -> None:
    segments = Segments(tmp_path, 1)
    segments.begin_group()
    (place,) = segments.append([Record.of(b"content")])
    segments.sync()
    with open(tmp_path / place.segment, "r+b") as file:
        file.seek(place.offset)
        file.write(b"C")
    with pytest.raises(PayloadCorrupt, match="does not have the hash"):
        segments.read(place)


def test_a_group_can_be_taken_back(tmp_path: Path) -> None:
    segments = Segments(tmp_path, 1)
    segments.begin_group()
    (kept,) = segments.append([Record.of(b"kept")])
    segments.begin_group()
    segments.append([Record.of(b"lost")])
    segments.take_back()
    (again,) = segments.append([Record.of(b"again")])
    assert again.offset == kept.offset + 4 + HEADER.size
    assert [segments.read(kept), segments.read(again)] == [b"kept", b"again"]


def test_files_are_rolled_between_groups(tmp_path: Path) -> None:
    segments = Segments(tmp_path, 3, segment_bytes=20)
    names = []
    for _ in range(3):
        segments.begin_group()
        places = segments.append([Record.of(b"a" * 30), Record.of(b"b")])
        names += [place.segment for place in places]
    assert names == [f"000003-{n:06d}.seg" for n in (1, 1, 2, 2, 3, 3)]
