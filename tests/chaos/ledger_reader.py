"""Reads a ledger and its segments from the files alone, with none of the buffer's code.

The format, written down a second time: SQLite tables `events`, `records` and `snapshot`; events and
snapshot are msgpack maps; a record in a segment is b"DPR1", its length, its sha256, its bytes.
"""

from __future__ import annotations

import hashlib
import sqlite3
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

HEADER = struct.Struct("<4sQ32s")
ENDED = ("all_correct", "all_wrong", "stale", "surplus", "quarantined", "parked")


@dataclass(slots=True)
class FinalGroup:
    state: str
    responses: dict[int, dict[str, Any]]
    partials: dict[int, int] = field(default_factory=dict)
    """Tokens of unfinished responses."""
    chunks: list[tuple[int, set[int]]] = field(default_factory=list)
    """Records that hold these, and of which responses."""
    step: int | None = None

    def keep_chunks(self) -> None:
        """A record goes with the last of its responses."""
        self.chunks = [chunk for chunk in self.chunks if chunk[1] & self.partials.keys()]

    def drop_partials(self) -> None:
        self.partials, self.chunks = {}, []


@dataclass(slots=True)
class FinalState:
    """What is durable, as far as the checker needs it."""

    groups: dict[int, FinalGroup] = field(default_factory=dict)
    """Of training."""
    units: dict[int, FinalGroup] = field(default_factory=dict)
    """Of evaluations."""
    next_group_id: int = 1
    leases: dict[int, int] = field(default_factory=dict)
    """Lease -> group."""
    batches: dict[int, list[int]] = field(default_factory=dict)
    purged: dict[str, int] = field(default_factory=dict)
    records: dict[int, bytes] = field(default_factory=dict)
    archive: set[int] = field(default_factory=set)
    """Records of what became of groups that are forgotten."""
    num_dispatched: int = 0


def read(directory: Path) -> tuple[FinalState, list[str]]:
    """The durable state in an incarnation's directory, and what is wrong with its payload."""
    uri = f"file:{directory / 'ledger.sqlite'}?mode=ro"
    database = sqlite3.connect(uri, uri=True)
    try:
        row = database.execute("SELECT body FROM snapshot").fetchone()
        state = _from_snapshot(msgspec.msgpack.decode(row[0])) if row else FinalState()
        for (body,) in database.execute("SELECT body FROM events ORDER BY seq"):
            _apply(state, msgspec.msgpack.decode(body))
        rows = database.execute("SELECT record_id, segment, start, length, sha256 FROM records")
        problems = [text for row in rows if (text := _read_record(state, directory, *row))]
    finally:
        database.close()
    return state, problems


def _read_record(
    state: FinalState,
    directory: Path,
    record_id: int,
    segment: str,
    start: int,
    length: int,
    sha256: bytes,
) -> str:
    path = directory / segment
    if not path.exists():
        return f"lost: record {record_id}: there is no segment {segment}."
    with open(path, "rb") as file:
        file.seek(start - HEADER.size)
        header, content = file.read(HEADER.size), file.read(length)
    if header != HEADER.pack(b"DPR1", length, sha256):
        return f"lost: record {record_id} has another header in {segment}."
    if hashlib.sha256(content).digest() != sha256:
        return f"lost: record {record_id} has other bytes in {segment}."
    state.records[record_id] = sha256
    return ""


def _from_snapshot(snapshot: dict[str, Any]) -> FinalState:
    groups: dict[str, dict[int, FinalGroup]] = {"train": {}, "eval": {}}
    for group_id, group in snapshot["groups"].items():
        groups[group["kind"]][int(group_id)] = FinalGroup(
            group["state"],
            {int(index): response for index, response in group["responses"].items()},
            {int(index): num_tokens for index, num_tokens in group["partials"].items()},
            [(record_id, set(indices)) for record_id, indices, _ in group["chunks"]],
            group["step"],
        )
    return FinalState(
        groups=groups["train"],
        units=groups["eval"],
        next_group_id=snapshot["next_group_id"],
        leases={int(k): lease["group_id"] for k, lease in snapshot["leases"].items()},
        batches={int(k): list(batch["group_ids"]) for k, batch in snapshot["batches"].items()},
        purged=dict(snapshot["purged"]),
        archive=set(snapshot["archive"]),
        num_dispatched=snapshot["counters"].get("groups_dispatched", 0),
    )


def _apply(state: FinalState, event: dict[str, Any]) -> None:
    """One event, told again in a few lines."""
    group_id = event.get("group_id", state.leases.get(event.get("lease_id", 0), 0))
    group = state.groups.get(group_id) or state.units.get(group_id)
    match event["kind"]:
        case "Dispatched":
            state.groups[group_id] = FinalGroup("open", {})
            state.next_group_id = group_id + 1
            state.num_dispatched += 1
        case "Published" if event["evaluation"]:
            for _ in range(_num_units(event["evaluation"])):
                state.units[state.next_group_id] = FinalGroup("open", {})
                state.next_group_id += 1
        case "Leased":
            state.leases[event["lease_id"]] = event["group_id"]
        case "Progressed" if group:
            new = {int(index): num_tokens for index, num_tokens in event["num_tokens"].items()}
            for index, num_tokens in new.items():
                group.partials[index] = group.partials.get(index, 0) + num_tokens
            group.chunks.append((event["record_id"], set(new)))
        case "Stored" if group:
            for response in event["responses"]:
                group.responses[response["index"]] = response
                group.partials.pop(response["index"], None)
            group.keep_chunks()
            group.state = event["outcome"] or group.state
        case "PartialsDropped" if group:
            group.drop_partials()
        case "GroupDropped" if group:
            group.state = event["state"]
            group.drop_partials()
        case "BatchClosed":
            state.batches[event["step"]] = event["group_ids"]
            for group_id in event["group_ids"]:
                state.groups[group_id].state = "taken"
                state.groups[group_id].step = event["step"]
        case "Archived":
            state.archive.add(event["record_id"])
        case "Committed":
            _release(state, event["step"])


def _num_units(plan: dict[str, int]) -> int:
    return plan["num_prompts"] * -(-plan["num_samples"] // plan["unit_size"])


def _release(state: FinalState, step: int) -> None:
    for group_id, group in list(state.groups.items()):
        if group.state in ENDED or (group.step is not None and group.step <= step):
            state.purged[group.state] = state.purged.get(group.state, 0) + 1
            del state.groups[group_id]
    state.batches = {k: v for k, v in state.batches.items() if k > step}
