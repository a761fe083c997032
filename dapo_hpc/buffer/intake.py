"""What actors bring: tokens of unfinished responses, finished responses, leases handed back."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from dapo_hpc.buffer import events as ev
from dapo_hpc.buffer import suspects
from dapo_hpc.buffer.desk import Desk
from dapo_hpc.buffer.group import (
    Group,
    GroupState,
    LeaseEnd,
    LeaseRecord,
    StoredResponse,
    WasteCause,
    uniform_state,
)
from dapo_hpc.buffer.messages import (
    HeartbeatRequest,
    LeaseProgress,
    LeaseResponses,
    ReleaseRequest,
    Verdict,
    encode,
)
from dapo_hpc.buffer.segments import Record
from dapo_hpc.records import PartialResponse, PolicyVersion, Response, VersionSpan


def heartbeat(desk: Desk, request: HeartbeatRequest, now: float) -> tuple[list[int], list[int]]:
    """Extend the leases named and keep their new tokens. Returns (lost, abort) lease ids."""
    lost: list[int] = []
    abort: list[int] = []
    for progress in request.leases:
        lease = desk.book.state.leases.get(progress.lease_id)
        if lease is None or lease.actor != request.actor:
            lost.append(progress.lease_id)
            continue
        _progress(desk, lease, progress)
        if lease.state == "live":
            desk.extend(lease, now)
        elif lease.state == "aborted":
            abort.append(lease.lease_id)
        elif lease.state != "complete":
            lost.append(lease.lease_id)
    return lost, abort


def release(desk: Desk, request: ReleaseRequest) -> None:
    """End leases before their time; a prompt that failed max_attempts times is parked.

    A failure with several leases is the engine's: any of their prompts may have caused it.
    """
    cause: LeaseEnd = "released"
    if request.is_failure:
        cause = "failed" if len(request.leases) == 1 else "crashed"
    for progress in request.leases:
        lease = desk.book.state.leases.get(progress.lease_id)
        if lease is None or lease.actor != request.actor:
            continue
        _progress(desk, lease, progress)
        if lease.state != "live":
            continue
        desk.end_lease(lease, cause)
        suspects.park_if_due(desk, desk.book.state.groups[lease.group_id])


def seal(finished: LeaseResponses) -> list[Record]:
    """What would be kept of each response. Any thread: it takes as long as all the rest."""
    return [Record.of(encode(response)) for response in finished.responses]


def submit(
    desk: Desk, actor: str, finished: LeaseResponses, records: list[Record], now: float
) -> list[Verdict]:
    """Store finished responses of a lease; safe to repeat. Nothing is stored if any is wrong.

    `records` are the sealed responses.

    Raises:
        ValueError: foreign lease or index, malformed content, or other content for a stored
            index; a bug in the actor, do not retry.
    """
    lease = _lease_of(desk, actor, finished.lease_id)
    if lease is None:
        return ["fenced"] * len(finished.responses)
    group = desk.book.state.groups[lease.group_id]
    for response in finished.responses:
        _check(desk, lease, response)
    if len({r.index for r in finished.responses}) != len(finished.responses):
        raise ValueError(f"lease {lease.lease_id}: a submit names a response index twice.")
    verdicts = [
        _verdict(desk, lease, group, response, record)
        for response, record in zip(finished.responses, records, strict=True)
    ]
    fresh = [
        _stored(desk, lease, group, response, record)
        for response, record, verdict in zip(finished.responses, records, verdicts, strict=True)
        if verdict == "stored" and response.index not in group.responses
    ]
    fenced = [r for r, v in zip(finished.responses, verdicts, strict=True) if v == "fenced"]
    if lease.state == "live":
        desk.extend(lease, now)
    if fresh:
        _store(desk, lease, group, fresh)
    _refuse(desk, lease, group, fenced)
    return verdicts


def _lease_of(desk: Desk, actor: str, lease_id: int) -> LeaseRecord | None:
    """None: a lease so old that its group is forgotten."""
    lease = desk.book.state.leases.get(lease_id)
    if lease is None:
        if lease_id >= desk.book.state.next_lease_id:
            raise ValueError(f"lease {lease_id} was never handed out by this buffer.")
        return None
    if lease.actor != actor:
        raise ValueError(
            f"lease {lease.lease_id} belongs to {lease.actor}, but {actor} submits for it."
        )
    return lease


def _check(desk: Desk, lease: LeaseRecord, response: Response) -> None:
    """Raises ValueError unless a response is well-formed."""
    where = f"lease {lease.lease_id}, response {response.index}"
    if response.index not in lease.indices:
        raise ValueError(f"{where}: the lease is for responses {lease.indices}.")
    if len(response.token_ids) < 1:
        raise ValueError(f"{where}: a response has at least one token, its end token; got none.")
    _check_tokens(desk, where, response, 0)
    if not math.isfinite(response.reward):
        raise ValueError(f"{where}: the reward is {response.reward}; it must be a finite number.")


def _check_tokens(desk: Desk, where: str, sampled: Response | PartialResponse, first: int) -> None:
    """Raises ValueError unless the arrays match and the spans cover them from token `first` on."""
    tokens, logprobs = sampled.token_ids, sampled.rollout_logprobs
    if tokens.dtype != np.int32 or logprobs.dtype != np.float32 or len(tokens) != len(logprobs):
        raise ValueError(
            f"{where}: {len(tokens)} token ids ({tokens.dtype}) with {len(logprobs)} log-probs "
            f"({logprobs.dtype}); expected equally many, int32 and float32."
        )
    starts = [span.start for span in sampled.spans]
    is_ordered = starts == sorted(set(starts)) and starts[:1] == [first]
    if len(tokens) and not (is_ordered and starts[-1] < first + len(tokens)):
        raise ValueError(
            f"{where}: spans start at {starts}; expected increasing starts from {first}, below "
            f"{first + len(tokens)}."
        )
    for span in sampled.spans:
        check_published(desk, where, span.version)


def check_published(desk: Desk, where: str, version: PolicyVersion) -> None:
    """Raises ValueError for a version that no learner of this run can have published."""
    state = desk.book.state
    is_known = 0 <= version.step < state.current_step and 0 <= version.lineage <= state.lineage
    if not is_known:
        raise ValueError(f"{where}: version {version.name} was never published.")


def _verdict(
    desk: Desk, lease: LeaseRecord, group: Group, response: Response, record: Record
) -> Verdict:
    stored = group.responses.get(response.index)
    if stored is not None and stored.lease_id == lease.lease_id:
        if stored.sha256 != record.sha256:
            raise ValueError(
                f"lease {lease.lease_id}: response {response.index} of group {group.group_id} is "
                "already stored with other content; a finished response never changes."
            )
        return "stored"
    if stored is not None or not desk.may_fill(lease, group):
        return "fenced"
    is_usable = all(_is_usable(desk, group, span.version) for span in response.spans)
    return "stored" if is_usable else "fenced"


def _is_usable(desk: Desk, group: Group, version: PolicyVersion) -> bool:
    """Not of an abandoned lineage; for an evaluation, of the step evaluated."""
    is_pinned = group.version is None or version.step == group.version.step
    return is_pinned and not desk.book.is_abandoned(version)


def _stored(
    desk: Desk, lease: LeaseRecord, group: Group, response: Response, record: Record
) -> StoredResponse:
    return StoredResponse(
        index=response.index,
        lease_id=lease.lease_id,
        record_id=desk.write_record(record) if group.kind == "train" else None,
        sha256=record.sha256,
        num_tokens=len(response.token_ids),
        reward=response.reward,
        is_correct=response.is_correct,
        is_truncated=response.finish_reason == "length",
        versions=_versions(response.spans),
    )


def _versions(spans: Iterable[VersionSpan]) -> tuple[PolicyVersion, ...]:
    return tuple(dict.fromkeys(span.version for span in spans))


def _store(desk: Desk, lease: LeaseRecord, group: Group, fresh: list[StoredResponse]) -> None:
    outcome = _outcome(desk, group, fresh)
    is_stale = outcome == "stale"
    event = ev.Stored(
        lease_id=lease.lease_id, responses=fresh, outcome=None if is_stale else outcome
    )
    desk.emit(event)
    if is_stale:
        desk.drop_group(group, "stale")
    if lease.state == "complete":
        desk.forget_deadline(lease)


def _outcome(desk: Desk, group: Group, fresh: list[StoredResponse]) -> GroupState | None:
    """What the group becomes with these responses; None while some are missing."""
    responses = [*group.responses.values(), *fresh]
    if len(responses) < len(group.indices):
        return None
    if group.kind == "eval":
        return "evaluated"
    if min(v.step for r in responses for v in r.versions) < desk.oldest_step():
        return "stale"
    uniform = uniform_state(r.is_correct for r in responses)
    return uniform if uniform and desk.settings.dynamic_sampling else "ready"


def _refuse(desk: Desk, lease: LeaseRecord, group: Group, responses: list[Response]) -> None:
    """Count what came in vain. A live lease on abandoned or wrong weights ends."""
    tokens = {r.index: len(r.token_ids) - group.known_tokens(r.index) for r in responses}
    is_abandoned = any(desk.book.is_abandoned(s.version) for r in responses for s in r.spans)
    _count_late(desk, lease, group, tokens, "quarantined" if is_abandoned else None)
    if responses and lease.state == "live":
        desk.end_lease(lease, "aborted")


def _count_late(
    desk: Desk,
    lease: LeaseRecord,
    group: Group,
    tokens: dict[int, int],
    cause: WasteCause | None = None,
) -> None:
    """Count wasted tokens by response index, once for each index of a lease."""
    new = {i: max(0, n) for i, n in tokens.items() if n > 0 and i not in lease.counted_late}
    if not new:
        return
    desk.emit(
        ev.Wasted(
            lease_id=lease.lease_id,
            indices=list(new),
            cause=cause or _late_cause(lease, group),
            tokens=sum(new.values()),
        )
    )


def _late_cause(lease: LeaseRecord, group: Group) -> WasteCause:
    if group.last_lease_id != lease.lease_id:
        return "duplicate"
    match group.state:
        case "surplus" | "stale" | "quarantined" | "parked":
            return group.state
        case _:
            return "preempted"


def _progress(desk: Desk, lease: LeaseRecord, progress: LeaseProgress) -> None:
    """Keep new tokens of unfinished responses; tokens already known are skipped."""
    group = desk.book.state.groups[lease.group_id]
    if len(progress.new_tokens) != len(progress.offsets):
        raise ValueError(
            f"lease {lease.lease_id}: {len(progress.new_tokens)} pieces with "
            f"{len(progress.offsets)} offsets."
        )
    if len({part.index for part in progress.new_tokens}) != len(progress.new_tokens):
        raise ValueError(f"lease {lease.lease_id}: a message names a response index twice.")
    may_fill = desk.may_fill(lease, group) and not _has_gap(lease, group, progress)
    fresh = [
        _fresh_tokens(desk, lease, group, part, offset, may_fill=may_fill)
        for part, offset in zip(progress.new_tokens, progress.offsets, strict=True)
        if part.index not in group.responses
    ]
    fresh = [part for part in fresh if len(part.token_ids)]
    num_tokens = {part.index: len(part.token_ids) for part in fresh}
    versions = _versions(span for part in fresh for span in part.spans)
    is_usable = all(_is_usable(desk, group, version) for version in versions)
    if fresh and may_fill and is_usable:
        event = ev.Progressed(
            lease_id=lease.lease_id,
            record_id=desk.write_record(Record.of(encode(fresh))),
            num_tokens=num_tokens,
            versions=versions,
        )
        desk.emit(event)
        return
    _count_late(desk, lease, group, num_tokens, None if is_usable else "quarantined")
    if not is_usable and lease.state == "live":
        desk.end_lease(lease, "aborted")


def _has_gap(lease: LeaseRecord, group: Group, progress: LeaseProgress) -> bool:
    """The actor does not know yet that its lease ended and its tokens were dropped as too old."""
    parts = zip(progress.new_tokens, progress.offsets, strict=True)
    is_gap = any(offset > group.known_tokens(part.index) for part, offset in parts)
    return is_gap and lease.state != "live"


def _fresh_tokens(
    desk: Desk,
    lease: LeaseRecord,
    group: Group,
    part: PartialResponse,
    offset: int,
    *,
    may_fill: bool,
) -> PartialResponse:
    """The part of a piece behind the tokens already stored."""
    where = f"lease {lease.lease_id}, response {part.index}"
    if part.index not in lease.indices:
        raise ValueError(f"{where}: the lease is for responses {lease.indices}.")
    if offset < 0:
        raise ValueError(f"{where}: the piece starts at token {offset}; tokens count from 0.")
    _check_tokens(desk, where, part, offset)
    known = group.known_tokens(part.index)
    if not may_fill:
        return part
    if offset > known:
        raise ValueError(
            f"{where}: the piece starts at token {offset}, but only {known} are stored; send all "
            "tokens since the last acknowledged heartbeat."
        )
    return cut_start(part, offset, known)


def cut_start(part: PartialResponse, offset: int, start: int) -> PartialResponse:
    """The tokens of a piece from token `start` of the response on; the piece begins at `offset`."""
    if start == offset:
        return part
    token_ids = part.token_ids[start - offset :]
    before = [span for span in part.spans if span.start <= start][-1:]
    spans = [VersionSpan(start=start, version=span.version) for span in before]
    spans += [span for span in part.spans if span.start > start]
    return PartialResponse(
        index=part.index,
        token_ids=token_ids,
        rollout_logprobs=part.rollout_logprobs[start - offset :],
        spans=tuple(spans) if len(token_ids) else (),
    )
