"""What the handlers of the core share: the book, the settings, and the only way to write events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dapo_hpc.buffer import events as ev
from dapo_hpc.buffer import selection
from dapo_hpc.buffer.book import Book
from dapo_hpc.buffer.fleet import Fleet
from dapo_hpc.buffer.group import Group, GroupState, LeaseEnd, LeaseRecord
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
        self._held: dict[str, set[int]] = {}
        self.newest_since = now
        self.events: list[ev.AnyEvent] = []
        self.payloads: dict[int, bytes] = {}
        """Content of new records, by record id."""
        self.notices: list[str] = []
        """Sentences for the log."""
        self.said: set[str] = set()
        """Notices that are not repeated."""
        self.next_record_id = book.state.next_record_id

    def emit(self, event: ev.AnyEvent) -> None:
        """The only way to change the state."""
        self.book.apply(event)
        self.events.append(event)

    def write_record(self, content: bytes) -> int:
        """Keep a payload; the id goes into an event of the same request."""
        record_id = self.next_record_id
        self.next_record_id += 1
        self.payloads[record_id] = content
        return record_id

    def extend(self, lease: LeaseRecord, now: float) -> None:
        """Give a live lease its full time."""
        self.deadlines[lease.lease_id] = now + self.settings.lease_s
        self._held.setdefault(lease.actor, set()).add(lease.lease_id)

    def forget_deadline(self, lease: LeaseRecord) -> None:
        """A lease is not live any more."""
        self.deadlines.pop(lease.lease_id, None)
        self._held.get(lease.actor, set()).discard(lease.lease_id)

    def live_leases(self, actor: str) -> list[LeaseRecord]:
        """What an actor holds, oldest first."""
        leases = self.book.state.leases
        return [leases[lease_id] for lease_id in sorted(self._held.get(actor, ()))]

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
        """Groups that nobody holds, in dispatch order."""
        groups = (self.book.state.groups[group_id] for group_id in sorted(self.book.waiting))
        return [g for g in groups if g.kind == kind and (version is None or g.version == version)]

    def num_ready(self) -> int:
        return self.book.state.counters.get("train_ready", 0)

    def num_wanted(self) -> int:
        """Groups that should be open now."""
        return selection.prompts_in_flight(self.book.state, self.settings, self.num_ready())

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
