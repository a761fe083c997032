"""The leases an actor holds: what is waiting, being sampled, ended, and known to the buffer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from dapo_hpc.buffer.messages import LeaseProgress
from dapo_hpc.records import Lease, PartialResponse, PolicyVersion, VersionSpan
from dapo_hpc.rollout.engine import Sampled


@dataclass(slots=True, eq=False)
class Work:
    """One response of a lease, from its first token here until the buffer has stored it."""

    lease: Lease
    prefix: PartialResponse
    """What an earlier actor sampled."""
    spans: tuple[VersionSpan, ...]
    """Of prefix and new tokens; starts count from the response's first token."""
    acked: int
    """Tokens the buffer is known to have, the prefix included."""
    is_started: bool = False
    ended: Sampled | None = None
    is_scored: bool = False

    @property
    def request_id(self) -> str:
        return f"{self.lease.lease_id}/{self.prefix.index}"

    @property
    def num_prefix(self) -> int:
        return len(self.prefix.token_ids)

    def token_ids(self) -> np.ndarray:
        """[n] int32, all tokens of an ended response."""
        assert self.ended is not None, "token_ids is for a response that has ended"
        return np.concatenate([self.prefix.token_ids, self.ended.token_ids])

    def rollout_logprobs(self) -> np.ndarray:
        """[n] float32, all log-probs of an ended response."""
        assert self.ended is not None, "rollout_logprobs is for a response that has ended"
        return np.concatenate([self.prefix.rollout_logprobs, self.ended.logprobs])

    def response_spans(self) -> tuple[VersionSpan, ...]:
        """Of an ended response."""
        return spans_between(self.spans, 0, len(self.token_ids()))


PartialTokens = Callable[[list[str], dict[str, int]], list[Sampled]]
"""Engine.partial."""


class LeaseTable:
    """All work of an actor, by lease. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._by_lease: dict[int, dict[str, Work]] = {}

    def __len__(self) -> int:
        with self._lock:
            return len(self._by_lease)

    def take(self, lease: Lease) -> None:
        """Hold a lease; its responses wait to be started."""
        works = [
            Work(lease, prefix, merged(prefix.spans), len(prefix.token_ids))
            for prefix in lease.missing
        ]
        with self._lock:
            self._by_lease[lease.lease_id] = {work.request_id: work for work in works}

    def find(self, request_id: str) -> Work | None:
        """None when the lease was dropped or the response is stored."""
        with self._lock:
            return self._by_lease.get(int(request_id.partition("/")[0]), {}).get(request_id)

    def waiting(self) -> list[Work]:
        """Not started, in lease order."""
        return [work for work in self._all() if not work.is_started]

    def num_unsampled(self) -> int:
        """Responses that hold or need a place in the engine."""
        return sum(work.ended is None for work in self._all())

    def num_unstored(self) -> int:
        """Responses that have ended and are being scored or submitted."""
        return sum(work.ended is not None for work in self._all())

    def is_pinned(self, version: PolicyVersion | None) -> bool:
        """Whether an evaluation response is yet to end that only `version` may sample."""
        return any(
            work.ended is None and work.lease.version is not None and work.lease.version == version
            for work in self._all()
        )

    def start(self, work: Work, version: PolicyVersion) -> None:
        """The tokens of `work` from here on are of `version`."""
        with self._lock:
            work.is_started = True
            span = VersionSpan(start=work.num_prefix, version=version)
            work.spans = merged((*work.spans, span))

    def switch(self, version: PolicyVersion, num_tokens: Callable[[str], int]) -> None:
        """The next token of everything that is being sampled is of `version`."""
        with self._lock:
            for work in self._all():
                if work.is_started and work.ended is None:
                    start = work.num_prefix + num_tokens(work.request_id)
                    work.spans = merged((*work.spans, VersionSpan(start=start, version=version)))

    def score(self, work: Work) -> bool:
        """Mark a response as scored. True: it was the last of its lease."""
        with self._lock:
            work.is_scored = True
            works = self._by_lease.get(work.lease.lease_id, {})
            return all(other.is_scored for other in works.values())

    def finish(self, lease_id: int, indices: Iterable[int]) -> None:
        """The buffer has stored these responses, or wants them no more."""
        with self._lock:
            works = self._by_lease.get(lease_id, {})
            for index in indices:
                works.pop(f"{lease_id}/{index}", None)
            if not works:
                self._by_lease.pop(lease_id, None)

    def drop(self, lease_ids: Iterable[int] | None = None) -> list[str]:
        """Forget leases (None: all); returns the request ids to abort."""
        with self._lock:
            ids = list(self._by_lease) if lease_ids is None else lease_ids
            dropped = [self._by_lease.pop(lease_id, {}) for lease_id in ids]
        return [request_id for works in dropped for request_id in works]

    def progress(self, partial: PartialTokens, only: set[int] | None = None) -> list[LeaseProgress]:
        """Every lease held (or those in `only`) with the tokens the buffer does not have yet."""
        with self._lock:
            held = {
                lease_id: list(works.values())
                for lease_id, works in self._by_lease.items()
                if only is None or lease_id in only
            }
            skip = {
                work.request_id: work.acked - work.num_prefix
                for works in held.values()
                for work in works
            }
        new = {sampled.request_id: sampled for sampled in partial(list(skip), skip)}
        with self._lock:
            return [_lease_progress(lease_id, works, new) for lease_id, works in held.items()]

    def acknowledge(self, sent: Iterable[LeaseProgress]) -> None:
        """The buffer has the tokens of `sent`."""
        with self._lock:
            for lease in sent:
                for part, offset in zip(lease.new_tokens, lease.offsets, strict=True):
                    work = self.find(f"{lease.lease_id}/{part.index}")
                    if work is not None:
                        work.acked = max(work.acked, offset + len(part.token_ids))

    def _all(self) -> list[Work]:
        with self._lock:
            return [work for works in self._by_lease.values() for work in works.values()]


def _lease_progress(lease_id: int, works: list[Work], new: dict[str, Sampled]) -> LeaseProgress:
    parts: list[PartialResponse] = []
    offsets: list[int] = []
    for work in works:
        part = _unacknowledged(work, new.get(work.request_id))
        if part is not None:
            parts.append(part)
            offsets.append(work.acked)
    return LeaseProgress(lease_id=lease_id, new_tokens=parts, offsets=offsets)


def _unacknowledged(work: Work, running: Sampled | None) -> PartialResponse | None:
    """What the buffer lacks of a response: of its tail when it ended, else of its running part."""
    skip = work.acked - work.num_prefix
    if work.ended is not None:
        token_ids, logprobs = work.ended.token_ids[skip:], work.ended.logprobs[skip:]
    elif running is not None:
        token_ids, logprobs = running.token_ids, running.logprobs
    else:
        return None
    if not len(token_ids):
        return None
    return PartialResponse(
        index=work.prefix.index,
        token_ids=token_ids,
        rollout_logprobs=logprobs,
        spans=spans_between(work.spans, work.acked, work.acked + len(token_ids)),
    )


def merged(spans: Iterable[VersionSpan]) -> tuple[VersionSpan, ...]:
    """Spans without empty ones and without repeats of the version before."""
    kept: list[VersionSpan] = []
    for span in spans:
        if kept and kept[-1].start == span.start:
            kept.pop()
        if not kept or kept[-1].version != span.version:
            kept.append(span)
    return tuple(kept)


def spans_between(spans: Iterable[VersionSpan], start: int, end: int) -> tuple[VersionSpan, ...]:
    """The spans that cover tokens start to end - 1; the first one is cut to begin at `start`."""
    return merged(
        VersionSpan(start=max(span.start, start), version=span.version)
        for span in spans
        if span.start < end
    )
