"""A buffer core in memory, with actors and a learner that do what they are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dapo_hpc.buffer import messages as msg
from dapo_hpc.buffer.book import Book
from dapo_hpc.buffer.core import BufferSettings, Core, Prompts
from dapo_hpc.buffer.events import decode_event, encode_event
from dapo_hpc.prompts.order import PromptOrder
from dapo_hpc.records import (
    Lease,
    PartialResponse,
    PolicyVersion,
    Prompt,
    Response,
    VersionSpan,
)

SMALL = BufferSettings(
    total_steps=50,
    prompts_per_step=2,
    group_size=2,
    dynamic_sampling=True,
    max_staleness=0,
    lease_s=30.0,
    max_attempts=3,
    on_exhausted="next_pass",
    eval_samples=3,
)


def prompt(row: int) -> Prompt:
    return Prompt(
        uid=f"prompt-{row}",
        row=row,
        token_ids=np.arange(row + 1, dtype=np.int32),
        data_source="even" if row % 2 == 0 else "odd",
        ground_truth=str(row),
    )


def make_prompts(num_train: int = 6, num_eval: int = 2, seed: int = 0) -> Prompts:
    return Prompts(
        [prompt(row) for row in range(num_train)],
        [prompt(row) for row in range(num_eval)],
        PromptOrder(num_train, seed),
    )


def submission(lease_id: int, responses: Sequence[Response], actor: str = "a") -> msg.SubmitRequest:
    finished = msg.LeaseResponses(lease_id=lease_id, responses=list(responses))
    return msg.SubmitRequest(actor=actor, leases=[finished], stats=msg.ActorStats())


def response(
    index: int,
    version: PolicyVersion,
    *,
    is_correct: bool = True,
    num_tokens: int = 3,
    prefix: PartialResponse | None = None,
) -> Response:
    """A finished response; with a prefix, its first tokens are those."""
    spans = prefix.spans if prefix is not None and len(prefix.token_ids) else ()
    known = 0 if prefix is None else len(prefix.token_ids)
    tokens = np.arange(num_tokens + known, dtype=np.int32)
    if known:
        assert prefix is not None
        tokens[:known] = prefix.token_ids
    if not spans or spans[-1].version != version:
        spans = (*spans, VersionSpan(start=known, version=version))
    return Response(
        index=index,
        token_ids=tokens,
        rollout_logprobs=np.full(len(tokens), -0.5, dtype=np.float32),
        spans=spans,
        finish_reason="stop",
        is_correct=is_correct,
        reward=1.0 if is_correct else -1.0,
    )


def piece(index: int, offset: int, num_tokens: int, version: PolicyVersion) -> PartialResponse:
    """New tokens of an unfinished response from `offset` on."""
    return PartialResponse(
        index=index,
        token_ids=np.arange(offset, offset + num_tokens, dtype=np.int32),
        rollout_logprobs=np.full(num_tokens, -0.25, dtype=np.float32),
        spans=(VersionSpan(start=offset, version=version),),
    )


class World:
    """A core whose disk is a list; `crash` throws the process away and reopens the disk."""

    def __init__(self, prompts: Prompts | None = None, **changes: Any) -> None:
        self.settings = replace(SMALL, **changes)
        self.prompts = prompts or make_prompts()
        self.now = 1000.0
        self.disk: list[bytes] = []
        self.records: dict[int, bytes] = {}
        self.notices: list[str] = []
        self.num_calls = 0
        self.core = self._open()

    def _open(self, book: Book | None = None) -> Core:
        return Core(self.settings, self.prompts, self.records.__getitem__, now=self.now, book=book)

    def flush(self) -> None:
        """What the writer does: effects become durable."""
        effects = self.core.take_effects()
        self.disk += [encode_event(event) for event in effects.events]
        self.records |= {k: record.content for k, record in effects.payloads.items()}
        for record_id in effects.freed:
            del self.records[record_id]
        self.notices += effects.notices

    def replayed(self) -> Book:
        book = Book()
        for body in self.disk:
            book.apply(decode_event(body))
        book.freed.clear()
        return book

    def crash(self) -> None:
        """SIGKILL and reopen: only the disk is left."""
        self.core = self._open(self.replayed())

    def tick(self, seconds: float) -> None:
        """Let time pass in steps short enough that the buffer does not seem to have stood still."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + self.settings.lease_s / 4)
            self.core.tick(self.now)
        self.flush()

    # the learner

    def start(self, step: int = 0, *, is_evaluated: bool = False) -> PolicyVersion:
        """Register from `step` and publish it."""
        lineage = self.core.register(msg.RegisterRequest(step=step), self.now).lineage
        self.flush()
        return self.publish(step, lineage, is_evaluated=is_evaluated)

    def publish(
        self, step: int, lineage: int | None = None, *, is_evaluated: bool = False
    ) -> PolicyVersion:
        lineage = self.core.book.state.lineage if lineage is None else lineage
        version = PolicyVersion(step=step, lineage=lineage)
        request = msg.PublishRequest(version=version, is_evaluated=is_evaluated)
        self.core.publish(request, self.now)
        self.flush()
        return version

    def take(self, step: int, lineage: int | None = None) -> msg.TakeReply:
        lineage = self.core.book.state.lineage if lineage is None else lineage
        request = msg.TakeRequest(lineage=lineage, step=step, wait_s=0.0)
        reply = self.core.take(request, self.now)
        self.flush()
        return reply

    def commit(self, step: int) -> None:
        lineage = self.core.book.state.lineage
        self.core.commit(msg.CommitRequest(lineage=lineage, step=step), self.now)
        self.flush()

    # actors

    def ask(
        self,
        actor: str = "a",
        version: PolicyVersion | None = None,
        free: int = 100,
        call_id: str = "",
    ) -> msg.LeaseReply:
        self.num_calls += 1
        request = msg.LeaseRequest(
            actor=actor, version=version, max_responses=free, wait_s=0.0, stats=msg.ActorStats()
        )
        reply = self.core.lease(request, self.now, call_id or f"call-{self.num_calls}")
        self.flush()
        return reply

    def lease(
        self, actor: str = "a", version: PolicyVersion | None = None, free: int = 100
    ) -> list[Lease]:
        """Hold the newest weights unless told otherwise, and ask."""
        held = self.core.book.state.newest if version is None else version
        return self.ask(actor, held, free).leases

    def submit(
        self, lease_id: int, responses: Sequence[Response], actor: str = "a"
    ) -> list[msg.Verdict]:
        request = submission(lease_id, responses, actor)
        verdicts = self.core.submit(request, self.now).verdicts[0]
        self.flush()
        return verdicts

    def heartbeat(
        self,
        lease_id: int,
        pieces: Sequence[PartialResponse] = (),
        offsets: Sequence[int] = (),
        actor: str = "a",
    ) -> msg.HeartbeatReply:
        progress = msg.LeaseProgress(
            lease_id=lease_id, new_tokens=list(pieces), offsets=list(offsets)
        )
        version = self.core.book.state.newest
        request = msg.HeartbeatRequest(
            actor=actor, version=version, leases=[progress], stats=msg.ActorStats()
        )
        reply = self.core.heartbeat(request, self.now)
        self.flush()
        return reply

    def release(self, lease_id: int, *, is_failure: bool, actor: str = "a") -> None:
        progress = msg.LeaseProgress(lease_id=lease_id, new_tokens=[], offsets=[])
        request = msg.ReleaseRequest(actor=actor, leases=[progress], is_failure=is_failure)
        self.core.release(request, self.now)
        self.flush()

    def answer(
        self,
        lease: Lease,
        outcomes: Sequence[bool] | None = None,
        actor: str = "a",
        num_tokens: int = 3,
        version: PolicyVersion | None = None,
    ) -> None:
        """Finish every missing response of a lease; informative unless told otherwise."""
        used = version or lease.version or self.core.book.state.newest
        assert used is not None
        outcomes = outcomes or [part.index % 2 == 0 for part in lease.missing]
        finished = [
            response(part.index, used, is_correct=is_correct, num_tokens=num_tokens, prefix=part)
            for part, is_correct in zip(lease.missing, outcomes, strict=True)
        ]
        self.submit(lease.lease_id, finished, actor)

    def fill(self, step: int, actor: str = "a") -> msg.TakeReply:
        """Answer everything informatively until the batch of `step` is closed."""
        for _ in range(20):
            for lease in self.lease(actor):
                if lease.kind == "train":
                    self.answer(lease, actor=actor)
            reply = self.take(step)
            if reply.groups is not None:
                return reply
        raise AssertionError(f"step {step} did not close: {self.core.status(self.now)}")
