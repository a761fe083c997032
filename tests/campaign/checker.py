"""The verdict on a campaign, from what every process wrote down and the final ledger.

It shares no code with the service: the ledger is opened with sqlite3 and decoded as plain msgpack.
What a response must look like follows from `draws`.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tests.campaign import draws, history

Key = tuple[int, int]
"""(group, index)."""


@dataclass(slots=True)
class Verdict:
    """Counts; each of `faults` must be 0."""

    faults: Counter[str] = field(default_factory=Counter)
    figures: dict[str, float] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def fault(self, name: str, what: str) -> None:
        self.faults[name] += 1
        if len(self.examples) < 20:
            self.examples.append(f"{name}: {what}")


@dataclass(slots=True, kw_only=True)
class Promise:
    """What the run was configured to keep."""

    group_size: int
    batch_groups: int
    max_staleness: int


@dataclass(slots=True)
class Evidence:
    """The histories, sorted by what they speak of."""

    trained: dict[int, list[dict[str, Any]]]
    """Step -> each note of it."""
    acked: dict[Key, list[int]]
    """Tokens of each response the buffer said it stored."""
    reported: dict[Key, list[dict[str, Any]]]
    began: list[tuple[int, int]]
    """(lineage, step) of each life of the trainer."""
    leased_at: list[float]

    @classmethod
    def read(cls, directory: Path, verdict: Verdict) -> Evidence:
        found = cls(defaultdict(list), {}, defaultdict(list), [], [])
        for note in history.read(directory, "trainer-*.jsonl"):
            if note["kind"] == "trained":
                found.trained[note["step"]].append(note)
            elif note["kind"] == "began":
                found.began.append((note["lineage"], note["step"]))
        for note in history.read(directory, "actor-*.jsonl"):
            if note["kind"] == "leased":
                found.leased_at.append(note["at_s"])
            elif note["kind"] == "reported":
                found.reported[note["group"], note["index"]].append(note)
            elif note["kind"] == "submitted" and note["verdict"] == "stored":
                key = (note["group"], note["index"])
                if found.acked.setdefault(key, note["tokens"]) != note["tokens"]:
                    verdict.fault("duplicated", f"response {key} was stored twice")
        return found


def judge(root: Path, promise: Promise) -> Verdict:
    """Read everything below a campaign's run directory."""
    verdict = Verdict()
    evidence = Evidence.read(root / "history", verdict)
    responses = _check_batches(evidence, promise, verdict)
    _check_contents(evidence, responses, verdict)
    _check_tokens(evidence, responses, promise, verdict)
    _check_nothing_lost(root, evidence, responses, promise, verdict)
    _compare_lengths(responses, promise, verdict)
    verdict.figures["groups trained"] = len({group for group, _ in responses})
    verdict.figures["responses acknowledged"] = len(evidence.acked)
    return verdict


def _check_batches(
    evidence: Evidence, promise: Promise, verdict: Verdict
) -> dict[Key, dict[str, Any]]:
    """Identical when replayed, exact, unstale, never twice. Returns every trained response."""
    responses: dict[Key, dict[str, Any]] = {}
    replayed = 0
    for step, notes in sorted(evidence.trained.items()):
        groups = notes[0]["groups"]
        replayed += len(notes) > 1
        if any(note["groups"] != groups for note in notes):
            verdict.fault("not replayed", f"step {step} was handed out in two forms")
        if len(groups) != promise.batch_groups:
            verdict.fault("wrong size", f"step {step} has {len(groups)} groups")
        for group in groups:
            _check_group(step, group, promise, verdict)
            for one in group["responses"]:
                key = (group["group"], one["index"])
                if key in responses:
                    verdict.fault("trained twice", f"response {key}, again in step {step}")
                responses[key] = one
    if sorted(evidence.trained) != list(range(1, len(evidence.trained) + 1)):
        verdict.fault("step missing", f"{len(evidence.trained)} of {max(evidence.trained)}")
    verdict.figures["steps replayed"] = replayed
    return responses


def _check_group(step: int, group: dict[str, Any], promise: Promise, verdict: Verdict) -> None:
    where = f"group {group['group']} of step {step}"
    if [one["index"] for one in group["responses"]] != list(range(promise.group_size)):
        verdict.fault("incomplete", where)
    if len({one["is_correct"] for one in group["responses"]}) != 2:
        verdict.fault("uniform", where)
    oldest = min(version for one in group["responses"] for version in one["steps"])
    if oldest < step - 1 - promise.max_staleness:
        verdict.fault("stale", f"{where} holds tokens of policy step {oldest}")


def _check_contents(
    evidence: Evidence, responses: dict[Key, dict[str, Any]], verdict: Verdict
) -> None:
    """What is trained is what was acknowledged, as long and as right as it had to be."""
    unwitnessed = 0
    for key, one in responses.items():
        if key not in evidence.acked:
            unwitnessed += 1  # its actor was killed between the answer and the note
        elif evidence.acked[key] != one["tokens"]:
            verdict.fault("altered", f"response {key}")
        if len(one["tokens"]) != draws.num_tokens(*key):
            verdict.fault("wrong length", f"response {key} has {len(one['tokens'])} tokens")
        if one["is_correct"] != draws.is_correct(*key):
            verdict.fault("wrong outcome", f"response {key}")
    verdict.figures["trained, acknowledgement unwitnessed"] = unwitnessed


def _check_tokens(
    evidence: Evidence,
    responses: dict[Key, dict[str, Any]],
    promise: Promise,
    verdict: Verdict,
) -> None:
    """Tokens that the buffer acknowledged are in the response that is trained."""
    steps = {
        group["group"]: step
        for step, notes in evidence.trained.items()
        for group in notes[0]["groups"]
    }
    recovered: set[Key] = set()
    for key, notes in evidence.reported.items():
        if key not in responses:
            continue
        tokens = responses[key]["tokens"]
        oldest = steps[key[0]] - 1 - promise.max_staleness
        for note in notes:
            piece = tokens[note["offset"] : note["offset"] + len(note["tokens"])]
            if piece == note["tokens"]:
                continue
            is_unusable = any(
                step < oldest or _is_abandoned(evidence, step, lineage)
                for step, lineage in note["versions"]
            )
            if not is_unusable:
                verdict.fault("redrawn", f"response {key}, lease {note['lease']}")
        if len({note["lease"] for note in notes}) > 1:
            recovered.add(key)
    verdict.figures["responses continued by another lease"] = len(recovered)


def _is_abandoned(evidence: Evidence, step: int, lineage: int) -> bool:
    return any(later > lineage and start < step for later, start in evidence.began)


def _check_nothing_lost(
    root: Path,
    evidence: Evidence,
    responses: dict[Key, dict[str, Any]],
    promise: Promise,
    verdict: Verdict,
) -> None:
    """Each acknowledged response was trained, is in the ledger, or its group left for a cause that
    the ledger names."""
    ledger = read_ledger(root)
    trained = {group for group, _ in responses}
    last_step = max(evidence.trained)
    dropped = 0
    for group_id in {group for group, _ in evidence.acked} - trained:
        fate = ledger.fates.get(group_id)
        known = ledger.groups.get(group_id)
        mine = [index for index in range(promise.group_size) if (group_id, index) in evidence.acked]
        if known is not None and known["state"] in ("open", "ready", "taken"):
            for index in mine:
                stored = known["responses"].get(index)
                if stored is None or stored["num_tokens"] != len(evidence.acked[group_id, index]):
                    verdict.fault("lost", f"response {(group_id, index)}")
        if fate is None or (fate.state == "taken" and (fate.step or 0) <= last_step):
            what = "never trained" if fate else "in the ledger neither alive nor ended"
            verdict.fault("lost", f"group {group_id}, {what}")
        if fate is not None and fate.state in ("all_correct", "all_wrong"):
            outcomes = {draws.is_correct(group_id, index) for index in range(promise.group_size)}
            if len(outcomes) == 2:
                verdict.fault("lost", f"group {group_id} is informative, and ended {fate.state}")
        dropped += fate is not None and fate.state in ("stale", "surplus", "quarantined")
    verdict.figures["groups stale, surplus or quarantined"] = dropped
    if ledger.counters.get("invariant_violations", 0):
        verdict.fault("invariant", str(ledger.counters["invariant_violations"]))


class Fate(NamedTuple):
    """Where a group is, or how it ended."""

    state: str
    step: int | None
    """The batch that held it."""


@dataclass(slots=True)
class FinalLedger:
    """The newest ledger: its snapshot, the events behind it, and its archive."""

    groups: dict[int, dict[str, Any]]
    """Not forgotten yet."""
    counters: dict[str, int]
    fates: dict[int, Fate]
    """Of every group that was ever dispatched."""


def read_ledger(root: Path) -> FinalLedger:
    ledgers = (root / "buffer").glob("ledger.*")
    newest = max(ledgers, key=lambda path: int(path.name.rpartition(".")[2]))
    with sqlite3.connect(newest / "ledger.sqlite") as ledger:
        (snapshot,) = ledger.execute("SELECT body FROM snapshot").fetchone()
        bodies = ledger.execute("SELECT body FROM events ORDER BY seq").fetchall()
        rows = ledger.execute("SELECT record_id, segment, start, length FROM records").fetchall()
    state = msgspec.msgpack.decode(snapshot)
    groups: dict[int, dict[str, Any]] = dict(state["groups"])
    leases = {k: lease["group_id"] for k, lease in state["leases"].items()}
    archive: list[int] = list(state["archive"])
    for (body,) in bodies:
        event = msgspec.msgpack.decode(body)
        match event["kind"]:
            case "Dispatched":
                groups[event["group_id"]] = {"state": "open", "responses": {}, "step": None}
            case "Leased":
                leases[event["lease_id"]] = event["group_id"]
            case "Stored":
                group = groups[leases[event["lease_id"]]]
                group["responses"] |= {one["index"]: one for one in event["responses"]}
                group["state"] = event["outcome"] or group["state"]
            case "GroupDropped":
                groups[event["group_id"]]["state"] = event["state"]
            case "BatchClosed":
                for group_id in event["group_ids"]:
                    groups[group_id] |= {"state": "taken", "step": event["step"]}
            case "Archived":
                archive.append(event["record_id"])
            case "Committed":
                groups = {k: v for k, v in groups.items() if _is_kept(v, event["step"])}
    fates = {group_id: Fate(group["state"], group["step"]) for group_id, group in groups.items()}
    places = {record_id: place for record_id, *place in rows}
    for record_id in archive:
        fates |= _archived(newest, *places[record_id])
    return FinalLedger(groups, state["counters"], fates)


def _archived(directory: Path, segment: str, start: int, length: int) -> dict[int, Fate]:
    """What became of the groups of one block: rows that begin with the group, its kind, its prompt,
    its position, its end and its batch."""
    content = (directory / segment).read_bytes()[start : start + length]
    rows = msgspec.msgpack.decode(zlib.decompress(content))
    return {group_id: Fate(state, step) for group_id, _, _, _, state, step, *_ in rows}


def _is_kept(group: dict[str, Any], committed: int) -> bool:
    """A commit forgets what it released, and what ended without being trained."""
    is_taken = group["state"] == "taken" and group["step"] > committed
    return is_taken or group["state"] in ("open", "ready")


def _compare_lengths(
    responses: dict[Key, dict[str, Any]],
    promise: Promise,
    verdict: Verdict,
) -> None:
    """I8: mean length of what was trained beside that of all informative groups up to there."""
    trained = {group for group, _ in responses}
    indices = range(promise.group_size)
    wanted = [
        group
        for group in range(1, max(trained) + 1)
        if len({draws.is_correct(group, index) for index in indices}) == 2
    ]
    verdict.figures["mean tokens trained"] = _mean_tokens(trained, indices)
    verdict.figures["mean tokens of informative groups"] = _mean_tokens(set(wanted), indices)


def _mean_tokens(groups: set[int], indices: range) -> float:
    lengths = [draws.num_tokens(group, index) for group in groups for index in indices]
    return sum(lengths) / len(lengths)


def recovery_s(killed_at: list[float], leased_at: list[float]) -> list[float]:
    """From each SIGKILL of the buffer to the next lease that any actor received."""
    leases = sorted(leased_at)
    found = []
    for killed in killed_at:
        later = next((at for at in leases if at > killed), None)
        if later is not None:
            found.append(later - killed)
    return found
