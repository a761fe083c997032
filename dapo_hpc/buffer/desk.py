"""What the handlers of the core share: the book, the settings, and the only way to write events."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dapo_hpc.buffer import events as ev
from dapo_hpc.buffer import selection
from dapo_hpc.buffer.accounting import Audit
from dapo_hpc.buffer.book import Book
from dapo_hpc.buffer.fleet import Fleet
from dapo_hpc.buffer.forecast import Outlook
from dapo_hpc.buffer.group import Group, GroupState, LeaseEnd, LeaseRecord
from dapo_hpc.buffer.segments import Record
from dapo_hpc.buffer.selection import BufferSettings
from dapo_hpc.prompts.order import PromptOrder
from dapo_hpc.records import PolicyVersion, Prompt


class LineageFenced(Exception):
    """Another learner registered later: exit."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """What there is to ask."""

    train: Sequence[Prompt]
    eval: Sequence[Prompt]
    order: PromptOrder


class Desk:
    """The state, its settings, and what is left to write since the last request."""

    def __init__(
        self,
        book: Book,
        settings: BufferSettings,
        prompts: Prompts,
        read_record: Callable[[int], bytes],
        now: float,
    ) -> None:
        self.book = book
        self.settings = settings
        self.prompts = prompts
        self.read_record = read_record
        self.fleet = Fleet(settings.lease_s, now, book.state.actor_stats)
        self.deadlines: dict[int, float] = {}
        """Monotonic second at which each live lease ends."""
        self._next_due = now
        """No live lease ends before."""
        self._held: dict[str, set[int]] = {}
        self._training: dict[str, set[int]] = {}
        """Live leases by actor; of training groups only."""
        self._waiting: dict[tuple[str, PolicyVersion | None], list[Group]] = {}
        self._waiting_at = -1
        self._fewest_at: tuple[int, float] = (-1, math.inf)
        self.newest_since = now
        self._need = 0
        self._new_at: tuple[int, int] = (-1, 0)
        """(version of the book, new prompts wanted)."""
        self._outlook_at: tuple[object, Outlook] | None = None
        self.predicted_rate = self.acceptance_rate()
        """Acceptance rate expected when the last batch closed."""
        self.full_since: float | None = None
        """When enough groups for the batch were ready, wherever they lie in the order."""
        self.events: list[ev.AnyEvent] = []
        self.payloads: dict[int, Record] = {}
        """New records by their id."""
        self.notices: list[str] = []
        """Sentences for the log."""
        self.audit = Audit()
        self.said: dict[str, tuple[float, int]] = {}
        """When a lasting state was last in the log, and how often it was left out since."""
        self.waiting_since: float | None = None
        """When the prompts ran out, if the run waits for a person."""
        self.uniform_limit = 0
        """Uniform groups of one step from which the log says so."""
        self.next_record_id = book.state.next_record_id

    def emit(self, event: ev.AnyEvent) -> None:
        """The only way to change the state."""
        self.book.apply(event)
        self.events.append(event)

    def write_record(self, record: Record) -> int:
        """Keep a payload; the id goes into an event of the same request."""
        record_id = self.next_record_id
        self.next_record_id += 1
        self.payloads[record_id] = record
        return record_id

    def extend(self, lease: LeaseRecord, now: float) -> None:
        """Give a live lease its full time."""
        self.deadlines[lease.lease_id] = now + self.settings.lease_s
        self._held.setdefault(lease.actor, set()).add(lease.lease_id)
        if self.book.state.groups[lease.group_id].kind == "train":
            self._training.setdefault(lease.actor, set()).add(lease.lease_id)

    def forget_deadline(self, lease: LeaseRecord) -> None:
        """A lease is not live any more."""
        self.deadlines.pop(lease.lease_id, None)
        for by_actor in (self._held, self._training):
            mine = by_actor.get(lease.actor, set())
            mine.discard(lease.lease_id)
            if not mine:
                by_actor.pop(lease.actor, None)  # there is no end to names in a long run

    def live_leases(self, actor: str) -> list[LeaseRecord]:
        """What an actor holds, oldest first."""
        leases = self.book.state.leases
        return [leases[lease_id] for lease_id in sorted(self._held.get(actor, ()))]

    def overdue(self, now: float) -> list[LeaseRecord]:
        """Live leases whose time is over."""
        if now < self._next_due:
            return []
        leases = self.book.state.leases
        due = [leases[lease_id] for lease_id, at in self.deadlines.items() if at <= now]
        later = (at for at in self.deadlines.values() if at > now)
        self._next_due = min(later, default=now + self.settings.lease_s)
        return due

    def prolong(self, seconds: float) -> None:
        """Give every live lease more time."""
        self.deadlines = {k: v + seconds for k, v in self.deadlines.items()}

    def num_held(self, actor: str) -> int:
        """Live leases of an actor."""
        return len(self._held.get(actor, ()))

    def num_training(self, actor: str) -> int:
        """Training groups under a live lease of an actor."""
        return len(self._training.get(actor, ()))

    def held_groups(self, actor: str, kind: str) -> list[Group]:
        """Groups of a kind under a live lease of an actor."""
        groups = self.book.state.groups
        held = (groups[lease.group_id] for lease in self.live_leases(actor))
        return [group for group in held if group.kind == kind]

    def end_lease(self, lease: LeaseRecord, cause: LeaseEnd) -> None:
        self.emit(ev.LeaseEnded(lease_id=lease.lease_id, cause=cause))
        self.forget_deadline(lease)
        view = self.fleet.views.get(lease.actor)
        if cause == "aborted" and view is not None:
            view.untold_aborts.append(lease.lease_id)

    def drop_group(self, group: Group, state: GroupState) -> None:
        """A live group leaves. Its prompt is asked again, unless it was parked."""
        lease = self.live_lease(group)
        if lease is not None:
            self.end_lease(lease, "aborted")
        is_returned = group.kind == "train" and state != "parked"
        self.emit(ev.GroupDropped(group_id=group.group_id, state=state, is_returned=is_returned))

    def live_lease(self, group: Group) -> LeaseRecord | None:
        return None if group.lease_id is None else self.book.state.leases[group.lease_id]

    def may_fill(self, lease: LeaseRecord, group: Group) -> bool:
        """Only the newest lease of an open group may; an ended one while it is still the newest."""
        return group.state == "open" and group.last_lease_id == lease.lease_id

    def oldest_step(self) -> int:
        """Tokens of older policy steps cannot enter the batch being filled."""
        return selection.oldest_step(self.settings, self.book.state.current_step)

    def waiting(self, kind: str, version: PolicyVersion | None = None) -> list[Group]:
        """Groups that nobody holds, in dispatch order; not to be changed by the caller.

        Thousands of evaluation units may wait while hundreds of actors ask twice a second, so the
        answer is kept until something about a waiting group changes.
        """
        if self._waiting_at != self.book.index.waiting_version:
            self._waiting_at, self._waiting = self.book.index.waiting_version, {}
        key = (kind, version)
        if key not in self._waiting:
            ids = sorted(self.book.index.waiting)
            groups = (self.book.state.groups[group_id] for group_id in ids)
            self._waiting[key] = [
                g for g in groups if g.kind == kind and (version is None or g.version == version)
            ]
        return self._waiting[key]

    def fewest_missing(self) -> float:
        """Places that the smallest of the waiting groups takes; infinite when there is none."""
        if self._fewest_at[0] != self.book.index.waiting_version:
            groups = (self.book.state.groups[group_id] for group_id in self.book.index.waiting)
            fewest = min((group.num_missing for group in groups), default=math.inf)
            self._fewest_at = (self.book.index.waiting_version, fewest)
        return self._fewest_at[1]

    def num_ready(self) -> int:
        return self.book.state.counters.get("train_ready", 0)

    def num_room(self) -> int:
        """Ready groups that may still come."""
        return selection.ready_capacity(self.book.state, self.settings) - self.num_ready()

    def outlook(self) -> Outlook:
        """What to expect of coming groups; computed when a group finished or a batch closed."""
        state = self.book.state
        key = (state.current_step, state.window.groups)
        if self._outlook_at is None or self._outlook_at[0] != key:
            self._outlook_at = (key, selection.outlook(state, self.settings))
        return self._outlook_at[1]

    def acceptance_rate(self) -> float:
        """Expected share of informative groups among those that finish."""
        return self.outlook().rate if self.settings.dynamic_sampling else 1.0

    def num_new(self) -> int:
        """Prompts to begin now, beside the open groups."""
        if self._new_at[0] != self.book.version:
            num_new = selection.num_new_prompts(
                self.settings,
                self.book.index.tally,
                self.outlook(),
                num_missing=self.settings.prompts_per_step - self.num_ready(),
                num_room=self.num_room(),
            )
            self._new_at = (self.book.version, num_new)
        return self._new_at[1]

    def num_wanted(self) -> int:
        """Groups that should be open now; 0 when nothing is needed."""
        return self.book.index.tally.num_groups + self.num_new() if self.num_room() > 0 else 0

    def wake_for_need(self) -> None:
        """Wake the requests that wait when more prompts are to begin than a moment ago."""
        need = self.num_new()
        if need > self._need:
            self.book.wakeups += 1
        self._need = need

    def check_lineage(self, lineage: int) -> None:
        """Raises LineageFenced for a learner that is not the last to have registered."""
        current = self.book.state.lineage
        if lineage < current:
            raise LineageFenced(
                f"this learner is lineage {lineage}, but lineage {current} registered after it; "
                "only the newest learner may go on. Exit."
            )
        if lineage > current:
            raise ValueError(
                f"lineage {lineage} was never registered; the newest is {current}. Call register "
                "before take, publish or commit."
            )
