"""The buffer's decisions: requests in, events and replies out. No I/O, no clock, no randomness.

Time comes in with every call (monotonic seconds), payloads are read through a function given at
the start. Whoever calls must make `take_effects()` durable before it lets the reply out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from dapo_hpc.buffer import accounting, batches, grants, intake, suspects
from dapo_hpc.buffer import events as ev
from dapo_hpc.buffer.book import Book
from dapo_hpc.buffer.desk import Desk, LineageFenced, Prompts
from dapo_hpc.buffer.fleet import ActorView
from dapo_hpc.buffer.history import encode_block
from dapo_hpc.buffer.messages import (
    CommitRequest,
    EvaluationsReply,
    FetchReply,
    FetchRequest,
    FinishRequest,
    HeartbeatReply,
    HeartbeatRequest,
    LeaseReply,
    LeaseRequest,
    PublishRequest,
    RegisterReply,
    RegisterRequest,
    ReleaseRequest,
    StoredGroup,
    SubmitReply,
    SubmitRequest,
    TakeReply,
    TakeRequest,
)
from dapo_hpc.buffer.segments import Record
from dapo_hpc.buffer.selection import BufferSettings

__all__ = ["BufferSettings", "Core", "Effects", "LineageFenced", "Prompts"]

STALL_FRAC = 0.5
"""A gap between two calls longer than this share of lease_s means that the buffer itself stood
still; the actors get their full time again."""


@dataclass(frozen=True, slots=True)
class Effects:
    """What must be on disk before the reply may go out."""

    events: list[ev.AnyEvent]
    payloads: dict[int, Record]
    freed: list[int]
    """Records no longer needed."""
    notices: list[str]
    """Sentences for the log."""


class Core:
    """The buffer without its disk and its network."""

    def __init__(
        self,
        settings: BufferSettings,
        prompts: Prompts,
        read_record: Callable[[int], bytes],
        *,
        now: float,
        book: Book | None = None,
    ) -> None:
        self.book = book or Book()
        self.book.forgotten.clear()  # by a replay; they are archived
        self.settings = settings
        self.desk = Desk(self.book, settings, prompts, read_record, now)
        self._last_tick = now
        for lease in self.book.state.leases.values():
            if lease.state == "live":
                self.desk.extend(lease, now)

    def take_effects(self) -> Effects:
        """Events and payloads since the last call."""
        desk, book = self.desk, self.book
        if book.forgotten:
            record_id = desk.write_record(Record.of(encode_block(book.forgotten)))
            desk.emit(ev.Archived(record_id=record_id))
            book.forgotten = []
        effects = Effects(desk.events, desk.payloads, book.freed, desk.notices)
        desk.events, desk.payloads, book.freed, desk.notices = [], {}, [], []
        return effects

    def tick(self, now: float) -> None:
        """Let time pass: leases of silent actors expire."""
        gap_s = now - self._last_tick
        self._last_tick = now
        if gap_s > STALL_FRAC * self.settings.lease_s:
            self.desk.prolong(gap_s)
        for lease in self.desk.overdue(now):
            suspects.lose(self.desk, lease)
        batches.advance(self.desk, now)
        self.desk.wake_for_need()

    # actors

    def lease(self, request: LeaseRequest, now: float, call_id: str) -> LeaseReply:
        """Whatever there is for this actor now; see `is_news` for whether to wait.

        `call_id` is the same each time the actor repeats a call whose answer it did not get.
        """
        self.tick(now)
        self._check_version(request)
        view = self.desk.fleet.heard(request.actor, request.version, request.stats, now)
        view.max_responses = max(view.max_responses, request.max_responses)
        leases = []
        if request.version is not None:
            call = grants.Call(request.actor, request.version, call_id, now)
            leases = grants.grant(self.desk, call, request.max_responses)
            self.desk.wake_for_need()
        newest = grants.newest_for(self.desk, view, now)
        view.is_told_done = self.book.state.is_finished
        return LeaseReply(
            leases=leases, newest=newest, abort=_pop_aborts(view), is_done=view.is_told_done
        )

    @staticmethod
    def is_news(request: LeaseRequest, reply: LeaseReply) -> bool:
        """True when a reply gives an actor something to do."""
        is_newer = reply.newest is not None and reply.newest != request.version
        return bool(reply.leases or reply.abort or reply.is_done or is_newer)

    def _check_version(self, request: LeaseRequest | HeartbeatRequest) -> None:
        if request.version is not None:
            intake.check_published(self.desk, f"actor {request.actor}", request.version)

    def heartbeat(self, request: HeartbeatRequest, now: float) -> HeartbeatReply:
        self._check_version(request)
        view = self.desk.fleet.heard(request.actor, request.version, request.stats, now)
        lost, abort = intake.heartbeat(self.desk, request, now)
        newest = grants.newest_for(self.desk, view, now)
        view.is_told_done = self.book.state.is_finished
        abort = sorted({*abort, *_pop_aborts(view)})
        self.tick(now)
        return HeartbeatReply(lost=lost, abort=abort, newest=newest, is_done=view.is_told_done)

    @staticmethod
    def seal(request: SubmitRequest) -> list[list[Record]]:
        """What `submit` would keep, for each lease; any thread."""
        return [intake.seal(part) for part in request.leases]

    def submit(
        self, request: SubmitRequest, now: float, sealed: list[list[Record]] | None = None
    ) -> SubmitReply:
        """Store what each lease finished, sealed before or here. Raises ValueError for a mistake in
        one of them; those before it are stored."""
        self.desk.fleet.worked(request.actor, request.stats, now)
        verdicts = [
            intake.submit(self.desk, request.actor, part, records, now)
            for part, records in zip(request.leases, sealed or self.seal(request), strict=True)
        ]
        self.tick(now)
        return SubmitReply(verdicts=verdicts)

    def release(self, request: ReleaseRequest, now: float) -> None:
        if request.stats is not None:
            self.desk.fleet.worked(request.actor, request.stats, now)
        intake.release(self.desk, request)
        self.tick(now)

    # the learner

    def register(self, request: RegisterRequest, now: float) -> RegisterReply:
        lineage = batches.register(self.desk, request.step)
        self.tick(now)
        return RegisterReply(lineage=lineage)

    def publish(self, request: PublishRequest, now: float) -> None:
        batches.publish(self.desk, request.version, is_evaluated=request.is_evaluated, now=now)
        self.tick(now)

    def take(self, request: TakeRequest, now: float) -> TakeReply:
        self.tick(now)
        taken = batches.take(self.desk, request.lineage, request.step)
        if taken is None:
            return TakeReply(groups=None)
        self.desk.audit.look_at_batch(self.book, request.step)
        return TakeReply(groups=taken[0], metrics=taken[1])

    def commit(self, request: CommitRequest, now: float) -> None:
        batches.commit(self.desk, request.lineage, request.step)
        self.tick(now)

    def fetch(self, request: FetchRequest) -> FetchReply:
        """Any thread. Raises ValueError for a group that is in no kept batch."""
        return FetchReply(groups=[self._stored_group(g) for g in request.group_ids])

    def _stored_group(self, group_id: int) -> StoredGroup:
        group = self.book.state.groups.get(group_id)
        if group is None or group.state != "taken":
            raise _not_kept(group_id)
        responses = [group.responses[index] for index in group.indices]
        try:
            records = [self.desk.read_record(r.record_id or 0) for r in responses]
        except KeyError:  # an old learner asks while a commit of a newer one frees them
            raise _not_kept(group_id) from None
        return StoredGroup(
            group_id=group_id,
            prompt=self.desk.prompts.train[group.row],
            records=records,
            sha256=[r.sha256 for r in responses],
        )

    def evaluations(self, now: float) -> EvaluationsReply:
        state = self.book.state
        versions = {evaluation.version for evaluation in state.evaluations}
        versions |= {v.version for v in self.desk.fleet.alive(now) if v.version is not None}
        return EvaluationsReply(
            results=sorted(state.results, key=lambda result: result.version),
            num_pending=len(state.evaluations),
            versions_in_use=sorted(versions),
        )

    def finish(self, request: FinishRequest) -> None:
        self.desk.check_lineage(request.lineage)
        if not self.book.state.is_finished:
            self.desk.emit(ev.Finished())

    def is_everyone_told(self, now: float) -> bool:
        """The run is complete and every live actor knows."""
        alive: Iterable[ActorView] = self.desk.fleet.alive(now)
        return self.book.state.is_finished and all(view.is_told_done for view in alive)

    # figures

    def check(self) -> list[str]:
        """Invariants that do not hold, one sentence each."""
        return self.desk.audit.look(self.book, self.settings)

    def status(self, now: float) -> dict[str, Any]:
        """A snapshot for people, in JSON types."""
        state = self.book.state
        self.check()
        violated = self.desk.audit.counts()
        generated_tokens = self.desk.fleet.totals().generated_tokens
        return {
            "step": state.current_step,
            "lineage": state.lineage,
            "newest": state.newest.name if state.newest else None,
            "is_finished": state.is_finished,
            "groups": dict(accounting.group_counts(self.book)),
            "leases": {
                "live": len(self.desk.deadlines),
                "responses_in_flight": accounting.responses_in_flight(self.book),
                "waiting_groups": len(self.book.index.waiting),
                "wanted_groups": self.desk.num_wanted(),
            },
            "actors": {
                view.name: {
                    "heard_s_ago": round(now - view.last_heard_s, 1),
                    "version": view.version.name if view.version else None,
                    "leases": self.desk.num_held(view.name),
                    **msgspec.to_builtins(view.stats),
                }
                for view in self.desk.fleet.views.values()
            },
            "invariants_violated": violated,
            "tokens": accounting.token_counts(self.book),
            "shares_of_all_tokens": accounting.token_shares(self.book, generated_tokens),
            "counters": {
                "invariant_violations": sum(violated.values()),
                **dict(sorted(state.counters.items())),
            },
            "acceptance_rate": self.desk.acceptance_rate(),
            "prompts_used": state.cursor,
            "prompts_returned": len(state.returned),
            "pending_evaluations": [e.version.name for e in state.evaluations],
            "versions_in_use": [v.name for v in self.evaluations(now).versions_in_use],
        }


def _not_kept(group_id: int) -> ValueError:
    return ValueError(f"group {group_id} is in no batch that is still kept.")


def _pop_aborts(view: ActorView) -> list[int]:
    aborts, view.untold_aborts = view.untold_aborts, []
    return aborts
