"""FakeBuffer: the four requests of an actor, answered from memory, every one recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dapo_hpc.buffer.messages import (
    HeartbeatReply,
    HeartbeatRequest,
    LeaseReply,
    LeaseRequest,
    ReleaseRequest,
    SubmitReply,
    SubmitRequest,
)
from dapo_hpc.records import Lease, LeaseKind, PartialResponse, PolicyVersion, Prompt, Response

LIMIT_S = 60.0
V0, V1 = PolicyVersion(step=0, lineage=1), PolicyVersion(step=1, lineage=1)


def empty_prefix(index: int) -> PartialResponse:
    return PartialResponse(
        index=index,
        token_ids=np.zeros(0, np.int32),
        rollout_logprobs=np.zeros(0, np.float32),
        spans=(),
    )


def make_lease(
    lease_id: int,
    *,
    size: int = 4,
    kind: LeaseKind = "train",
    version: PolicyVersion | None = None,
    missing: tuple[PartialResponse, ...] | None = None,
) -> Lease:
    prompt = Prompt(
        uid=f"uid-{lease_id}",
        row=lease_id,
        token_ids=np.array([1 + lease_id % 9, 10, 2, 11], np.int32),
        data_source="sums",
        ground_truth=str(lease_id),
    )
    return Lease(
        lease_id=lease_id,
        group_id=lease_id,
        kind=kind,
        attempt=0,
        prompt=prompt,
        missing=missing or tuple(empty_prefix(index) for index in range(size)),
        version=version,
        lease_s=60.0,
    )


@dataclass
class FakeBuffer:
    """Hands out what tests `offer`; a lease request waits until there is something to say."""

    newest: PolicyVersion | None = None
    newest_after_first_reply: PolicyVersion | None = None
    newest_in_heartbeats: PolicyVersion | None = None
    is_done: bool = False
    offered: list[Lease] = field(default_factory=list)
    to_abort: list[int] = field(default_factory=list)
    fails_next: list[Exception] = field(default_factory=list)
    """Raised by the next submits, in order."""
    lease_requests: list[LeaseRequest] = field(default_factory=list)
    heartbeats: list[HeartbeatRequest] = field(default_factory=list)
    submits: list[SubmitRequest] = field(default_factory=list)
    releases: list[ReleaseRequest] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def lease(self, request: LeaseRequest) -> LeaseReply:
        with self.changed:
            self.lease_requests.append(request)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self._has_news_for(request), request.wait_s)
            granted = self._grant(request)
            abort, self.to_abort = self.to_abort, []
            newest, self.newest = self.newest, self.newest_after_first_reply or self.newest
        return LeaseReply(leases=granted, newest=newest, abort=abort, is_done=self.is_done)

    def heartbeat(self, request: HeartbeatRequest) -> HeartbeatReply:
        with self.changed:
            self.heartbeats.append(request)
            self.changed.notify_all()
        return HeartbeatReply(
            lost=[], abort=[], newest=self.newest_in_heartbeats, is_done=self.is_done
        )

    def submit(self, request: SubmitRequest) -> SubmitReply:
        with self.changed:
            if self.fails_next:
                raise self.fails_next.pop(0)
            self.submits.append(request)
            self.changed.notify_all()
        return SubmitReply(verdicts=[["stored"] * len(part.responses) for part in request.leases])

    def release(self, request: ReleaseRequest) -> None:
        with self.changed:
            self.releases.append(request)
            self.changed.notify_all()

    def say(self, **news: object) -> None:
        """Change what the next replies say: say(newest=..., is_done=True, offered=[...])."""
        with self.changed:
            for name, value in news.items():
                setattr(self, name, value)
            self.changed.notify_all()

    def wait_for(self, happened: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(happened, LIMIT_S), "the actor did not get there in time"

    def held(self) -> PolicyVersion | None:
        """The version the actor named last."""
        return self.lease_requests[-1].version if self.lease_requests else None

    def responses(self) -> dict[tuple[int, int], Response]:
        """All submitted, by (lease, index); a repeated one is an error."""
        found: dict[tuple[int, int], Response] = {}
        for part in (part for request in self.submits for part in request.leases):
            for response in part.responses:
                key = (part.lease_id, response.index)
                assert key not in found, f"{key} was submitted twice"
                found[key] = response
        return found

    def _has_news_for(self, request: LeaseRequest) -> bool:
        fits = any(len(lease.missing) <= request.max_responses for lease in self.offered)
        return fits or bool(self.to_abort) or self.is_done or self.newest != request.version

    def _grant(self, request: LeaseRequest) -> list[Lease]:
        granted: list[Lease] = []
        places = request.max_responses
        while self.offered and len(self.offered[0].missing) <= places:
            granted.append(self.offered.pop(0))
            places -= len(granted[-1].missing)
        return granted
