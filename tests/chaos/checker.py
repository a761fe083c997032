"""Compares what the clients were promised with what is durable. Shares no code with the buffer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.chaos.history import GroupHistory, History
from tests.chaos.ledger_reader import FinalGroup, FinalState, read

KINDS = (
    "lost",
    "duplicated",
    "stale",
    "redrawn",
    "unexpected",
    "fenced",
    "unfenced",
    "changed",
    "uniform",
    "size",
    "invariant",
    "stuck",
    "leak",
    "refused",
)
"""The first word of a problem. The zeros of the summary."""
KEPT = ("open", "ready", "taken")


def check(history: History, directory: Path) -> list[str]:
    """Everything that contradicts a promise, one sentence each."""
    state, problems = read(directory)
    for group in history.groups.values():
        history.check_group(group)
        if group.kind == "train":
            problems += _check_kept(history, group, state)
    problems += _check_batches(history, state)
    problems += _check_payload(state)
    problems += _check_dispatched(state)
    return problems


def _check_kept(history: History, group: GroupHistory, state: FinalState) -> list[str]:
    """An acknowledged response is there, or its group has ended for a reason on record."""
    final = state.groups.get(group.group_id)
    acked = {i: a for i, attempts in group.attempts.items() for a in attempts if a.is_acked}
    if final is None:
        is_released = group.group_id <= max(history.forgotten, 0)
        ended = sum(state.purged.values())
        return [] if is_released or not acked or ended else [_lost(group, "its group is gone")]
    if final.state not in KEPT:
        return []
    problems = []
    for index, attempt in acked.items():
        stored = final.responses.get(index)
        if stored is None:
            problems.append(_lost(group, f"response {index} is not in the ledger"))
        elif stored["sha256"].hex() != attempt.sent_sha:
            problems.append(_lost(group, f"response {index} has other content"))
        elif state.records.get(stored["record_id"]) != stored["sha256"]:
            problems.append(_lost(group, f"the payload of response {index} is gone"))
    return problems + _check_partials(group, final)


def _check_partials(group: GroupHistory, final: FinalGroup) -> list[str]:
    """Tokens whose heartbeat was answered are there, unless they became too old."""
    problems = []
    for index, attempts in group.attempts.items():
        newest = max(attempts, key=lambda attempt: attempt.lease_id)
        stored = final.partials.get(index, 0)
        is_open = final.state == "open" and index not in final.responses
        if is_open and 0 < stored < newest.acked_tokens:
            problems.append(
                _lost(group, f"{newest.acked_tokens - stored} tokens of response {index}")
            )
    return problems


def _lost(group: GroupHistory, what: str) -> str:
    return f"lost: group {group.group_id}: {what}; it was acknowledged."


def _check_batches(history: History, state: FinalState) -> list[str]:
    """What a learner has taken and could be asked for again is still the same."""
    return [
        f"lost: batch {step} is not what a learner took."
        for step, batch in history.batches.items()
        if step > history.asked_step and state.batches.get(step) != batch.group_ids
    ]


def _check_payload(state: FinalState) -> list[str]:
    """Each record is there because a group needs it, and each group has its records."""
    needed = Counter(state.archive)
    for group in state.groups.values():
        if group.state in KEPT:
            needed.update(response["record_id"] for response in group.responses.values())
            needed.update(record_id for record_id, _ in group.chunks)
    for unit in state.units.values():
        needed.update(record_id for record_id, _ in unit.chunks)
    problems = [f"lost: record {k} is not on disk." for k in needed if k not in state.records]
    problems += [
        f"leak: record {k} is needed by nothing." for k in state.records if k not in needed
    ]
    return problems + [f"duplicated: record {k}." for k, n in needed.items() if n > 1]


def _check_dispatched(state: FinalState) -> list[str]:
    found = len(state.groups) + sum(state.purged.values())
    if found == state.num_dispatched:
        return []
    return [f"lost: {state.num_dispatched} groups were dispatched, {found} are accounted for."]
