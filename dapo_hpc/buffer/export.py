"""The history of a run as Parquet, from its files alone: while the buffer runs, and after it.

Two tables, described in docs/buffer.md, "Ledger export". Nothing in the run directory is written or
locked: the ledger is copied, and segments are read.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dapo_hpc.buffer.book import Book
from dapo_hpc.buffer.events import decode_event
from dapo_hpc.buffer.history import GroupRow, decode_block
from dapo_hpc.buffer.ledger import FILE, Ledger
from dapo_hpc.buffer.segments import PayloadCorrupt, Segments
from dapo_hpc.run_dir import RunDir

ATTEMPTS = 20
"""Copies of a ledger that changed meanwhile."""
PAUSE_S = 0.2
WAL_HEADER_BYTES = 32
CHUNK = 5000
"""Groups converted at once."""
GROUPS, RESPONSES = "groups.parquet", "responses.parquet"


def export(run: RunDir, out: Path) -> tuple[int, int]:
    """Write both tables to a directory. Returns the numbers of rows.

    Raises ValueError when the run has no ledger, or when it is damaged.
    """
    rows = read_history(run)
    out.mkdir(parents=True, exist_ok=True)
    return _write(rows, _uids(run), out)


def read_history(run: RunDir) -> list[GroupRow]:
    """Every group ever dispatched, by group id."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with tempfile.TemporaryDirectory(prefix="dapo-history-") as scratch:
                return _read(_newest_ledger(run), Path(scratch))
        except (FileNotFoundError, PayloadCorrupt, ValueError, KeyError) as error:
            # A running buffer wrote, moved or removed files between two steps of the copy.
            if attempt == ATTEMPTS or not _has_ledger(run):
                raise ValueError(f"{run.buffer} cannot be read: {error}") from error
            time.sleep(PAUSE_S)
    raise AssertionError("the last attempt returns or raises")


def _has_ledger(run: RunDir) -> bool:
    return any(run.buffer.glob(f"ledger.*/{FILE}"))


def _newest_ledger(run: RunDir) -> Path:
    found = [path.parent for path in run.buffer.glob(f"ledger.*/{FILE}")]
    if not found:
        raise ValueError(f"{run.buffer} holds no ledger; the run has no buffer yet.")
    return max(found, key=lambda path: int(path.suffix[1:]))


def _read(source: Path, scratch: Path) -> list[GroupRow]:
    _copy(source, scratch)
    ledger = Ledger(scratch)
    book = Book.from_snapshot(ledger.snapshot())
    for body in ledger.events():
        book.apply(decode_event(body))
    places = ledger.locations()
    ledger.close()
    segments = Segments(source, 0)
    blocks = [decode_block(segments.read(places[record_id])) for record_id in book.state.archive]
    segments.close()
    kept = [GroupRow.of(group, book.state.leases) for group in book.state.groups.values()]
    return sorted(itertools.chain(*blocks, kept), key=lambda row: row.group_id)


def _copy(source: Path, target: Path) -> None:
    """Database, then its log, of one moment. Raises ValueError when the database changed meanwhile.

    The log only grows until its pages go into the database, so the later copy of it fits.
    """
    before = _stamp(source)
    for name in (FILE, f"{FILE}-wal"):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    if _stamp(source) != before:
        raise ValueError(f"{source} changed while it was copied.")


def _stamp(source: Path) -> tuple[int, int, bytes]:
    status = (source / FILE).stat()
    log = source / f"{FILE}-wal"
    head = b""
    if log.exists():
        with open(log, "rb") as file:
            head = file.read(WAL_HEADER_BYTES)
    return status.st_mtime_ns, status.st_size, head


def _uids(run: RunDir) -> dict[str, list[str]]:
    """Prompt ids by row, for each kind of lease."""
    import pyarrow.parquet

    paths = {"train": run.train_prompts, "eval": run.eval_prompts}
    return {
        kind: pyarrow.parquet.read_table(path, columns=["uid"])["uid"].to_pylist()
        for kind, path in paths.items()
        if path.exists()
    }


def _write(rows: Sequence[GroupRow], uids: dict[str, list[str]], out: Path) -> tuple[int, int]:
    import pyarrow as pa

    text, names = pa.string(), pa.list_(pa.string())
    groups = pa.schema(
        [("group_id", pa.int64()), ("kind", text), ("prompt_row", pa.int32())]
        + [("prompt_uid", text), ("pass", pa.int32()), ("state", text), ("step", pa.int32())]
        + [("num_responses", pa.int32()), ("num_correct", pa.int32())]
        + [("pass_rate", pa.float64()), ("mean_tokens", pa.float64())]
        + [("max_tokens", pa.int32()), ("min_policy_step", pa.int32())]
        + [("max_policy_step", pa.int32()), ("num_leases", pa.int32())]
        + [("num_failures", pa.int32()), ("actors", names)]
    )
    responses = pa.schema(
        [("group_id", pa.int64()), ("index", pa.int32()), ("reward", pa.float64())]
        + [("is_correct", pa.bool_()), ("num_tokens", pa.int32()), ("is_truncated", pa.bool_())]
        + [("min_policy_step", pa.int32()), ("max_policy_step", pa.int32()), ("actor", text)]
    )
    num_groups = _write_table(out / GROUPS, groups, (_group(row, uids) for row in rows))
    each = (_response(row, place) for row in rows for place in range(len(row.responses)))
    return num_groups, _write_table(out / RESPONSES, responses, each)


def _write_table(path: Path, schema: Any, rows: Iterable[dict[str, Any]]) -> int:
    """Under another name first: a file with the right name is whole."""
    import pyarrow as pa
    import pyarrow.parquet

    num_rows = 0
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        for chunk in _chunks(rows):
            num_rows += len(chunk)
            writer.write_table(pa.Table.from_pylist(chunk, schema))
    os.replace(temporary, path)
    return num_rows


def _chunks(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, CHUNK)):
        yield chunk


def _group(row: GroupRow, uids: dict[str, list[str]]) -> dict[str, Any]:
    tokens = [response.num_tokens for response in row.responses]
    known = uids.get(row.kind, [])
    num_rows = len(uids.get("train", []))
    num_correct = sum(response.is_correct for response in row.responses)
    is_counted = row.kind == "train" and num_rows > 0
    return {
        "group_id": row.group_id,
        "kind": row.kind,
        "prompt_row": row.row,
        "prompt_uid": known[row.row] if row.row < len(known) else None,
        "pass": row.position // num_rows if is_counted else None,
        "state": row.state,
        "step": row.step,
        "num_responses": len(tokens),
        "num_correct": num_correct,
        "pass_rate": num_correct / len(tokens) if tokens else None,
        "mean_tokens": sum(tokens) / len(tokens) if tokens else None,
        "max_tokens": max(tokens, default=None),
        "min_policy_step": min((r.min_step for r in row.responses), default=None),
        "max_policy_step": max((r.max_step for r in row.responses), default=None),
        "num_leases": row.num_leases,
        "num_failures": row.failures,
        "actors": row.actors,
    }


def _response(row: GroupRow, place: int) -> dict[str, Any]:
    response = row.responses[place]
    return {
        "group_id": row.group_id,
        "index": response.index,
        "reward": response.reward,
        "is_correct": response.is_correct,
        "num_tokens": response.num_tokens,
        "is_truncated": response.is_truncated,
        "min_policy_step": response.min_step,
        "max_policy_step": response.max_step,
        "actor": row.actors[response.actor],
    }
