"""The one way the buffer's state changes: `Book.apply(event)`.

Applying the ledger's events in order to an empty book, or to a snapshot and the events behind it,
gives the same state again, byte for byte.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable
from typing import Any

import msgspec

from dapo_hpc.buffer import events as ev
from dapo_hpc.buffer.group import Chunk, Group, GroupState, LeaseRecord, StoredResponse
from dapo_hpc.buffer.history import GroupRow
from dapo_hpc.buffer.index import Index
from dapo_hpc.buffer.state import Batch, Evaluation, Returned, Rollback, State, Window
from dapo_hpc.records import PolicyVersion

HISTORY_DECAY = 0.5
"""Weight of what was measured before, each time a batch closes: the policy changes with each."""

_WAKING = (
    ev.LeaseEnded,
    ev.PartialsDropped,
    ev.GroupDropped,
    ev.PassOpened,
    ev.BatchClosed,
    ev.Registered,
    ev.Published,
    ev.Evaluated,
    ev.Finished,
)

_ENDED = {
    ("train", state)
    for state in ("all_correct", "all_wrong", "stale", "surplus", "quarantined", "parked")
} | {("eval", "quarantined")}
"""Groups that a commit forgets; until then a repeated submit is answered as the first time."""


class Book:
    """The state with its indices. Every `_on_*` method is the whole effect of one event."""

    def __init__(self, state: State | None = None) -> None:
        self.state = state or State()
        self.index = Index()
        self.version = 0
        """Number of events applied."""
        self.freed: list[int] = []
        """Payload records no longer needed; the store empties this."""
        self.forgotten: list[GroupRow] = []
        """Groups that are to be archived; the core empties this."""
        self.wakeups = 0
        """Changes a waiting request may have waited for."""
        for group_id in sorted(self.state.groups):
            self.index.add(self.state.groups[group_id])
        self._handlers: dict[type, Callable[[Any], None]] = {
            ev.Dispatched: self._on_dispatched,
            ev.Leased: self._on_leased,
            ev.Progressed: self._on_progressed,
            ev.Stored: self._on_stored,
            ev.LeaseEnded: self._on_lease_ended,
            ev.PartialsDropped: self._on_partials_dropped,
            ev.GroupDropped: self._on_group_dropped,
            ev.PassOpened: self._on_pass_opened,
            ev.BatchClosed: self._on_batch_closed,
            ev.Registered: self._on_registered,
            ev.Published: self._on_published,
            ev.Evaluated: self._on_evaluated,
            ev.Wasted: self._on_wasted,
            ev.Archived: self._on_archived,
            ev.Committed: self._on_committed,
            ev.Finished: self._on_finished,
        }

    @classmethod
    def from_snapshot(cls, snapshot: bytes | None) -> Book:
        return cls(None if snapshot is None else msgspec.msgpack.decode(snapshot, type=State))

    def snapshot(self) -> bytes:
        return msgspec.msgpack.encode(self.state)

    def apply(self, event: ev.AnyEvent) -> None:
        """Change the state by one event."""
        self._handlers[type(event)](event)
        self.version += 1
        if isinstance(event, _WAKING):
            self.wakeups += 1

    def is_abandoned(self, version: PolicyVersion) -> bool:
        """True when a later lineage went back to before this version."""
        return any(
            version.lineage < rollback.lineage and version.step > rollback.step
            for rollback in self.state.rollbacks
        )

    def count(self, name: str, amount: int = 1) -> None:
        self.state.counters[name] = self.state.counters.get(name, 0) + amount

    # prompts and leases

    def _on_dispatched(self, event: ev.Dispatched) -> None:
        if event.is_returned:
            self.state.returned.pop(0)
        else:
            self.state.cursor += 1
        self._add(
            Group(
                group_id=event.group_id,
                kind="train",
                row=event.row,
                position=event.position,
                version=None,
                indices=list(range(event.group_size)),
                failures=event.failures,
                deaths=event.deaths,
            )
        )
        self.count("groups_dispatched")

    def _on_leased(self, event: ev.Leased) -> None:
        group = self.state.groups[event.group_id]
        group.lease_id = event.lease_id
        group.lease_ids.append(event.lease_id)
        self.index.stop_waiting(group)
        self.state.leases[event.lease_id] = LeaseRecord(
            lease_id=event.lease_id,
            group_id=event.group_id,
            actor=event.actor,
            version=event.version,
            indices=list(event.indices),
            call_id=event.call_id,
        )
        self.state.next_lease_id = event.lease_id + 1
        self.count("responses_leased", len(event.indices))

    def _on_lease_ended(self, event: ev.LeaseEnded) -> None:
        lease = self.state.leases[event.lease_id]
        group = self.state.groups[lease.group_id]
        lease.state = event.cause
        self.count(f"responses_{event.cause}", len(self.unfilled(lease)))
        self.count(f"leases_{event.cause}")
        group.lease_id = None
        group.failures += event.cause == "failed"
        group.deaths += event.cause in ("expired", "crashed") and not lease.is_proven
        self.index.start_waiting(group)

    def unfilled(self, lease: LeaseRecord) -> list[int]:
        """Indices of a lease that no response has filled."""
        responses = self.state.groups[lease.group_id].responses
        return [index for index in lease.indices if index not in responses]

    # responses

    def _on_progressed(self, event: ev.Progressed) -> None:
        lease = self.state.leases[event.lease_id]
        group = self.state.groups[lease.group_id]
        self._prove(lease, group)
        self.count("tokens_delivered", sum(event.num_tokens.values()))
        for index, num_tokens in event.num_tokens.items():
            group.partials[index] = group.known_tokens(index) + num_tokens
        group.chunks.append(Chunk(event.record_id, tuple(event.num_tokens), event.versions))
        self._record_written(event.record_id)

    def _on_stored(self, event: ev.Stored) -> None:
        lease = self.state.leases[event.lease_id]
        group = self.state.groups[lease.group_id]
        self._prove(lease, group)
        if lease.state != "live":
            self.count(f"responses_{lease.state}", -len(event.responses))
        for response in event.responses:
            self._fill(group, response)
        if lease.state == "live" and not self.unfilled(lease):
            lease.state = "complete"
            group.lease_id = None
        if event.outcome is not None:
            self._settle(group, event.outcome)
            self._measure(group, event.outcome)

    @staticmethod
    def _prove(lease: LeaseRecord, group: Group) -> None:
        lease.is_proven = True
        group.deaths = 0

    def _fill(self, group: Group, response: StoredResponse) -> None:
        self.index.count_open(group, -1)
        self.index.waiting_version += group.group_id in self.index.waiting
        new_tokens = response.num_tokens - group.known_tokens(response.index)
        self.count("tokens_delivered", new_tokens)
        group.responses[response.index] = response
        self.index.count_open(group, 1)
        self.freed += group.drop_partial(response.index)
        self.count("responses_accepted")
        if response.record_id is not None:
            self._record_written(response.record_id)
        if group.kind == "train":
            self.state.window.responses += 1
            self.state.window.correct += response.is_correct

    def _measure(self, group: Group, outcome: GroupState) -> None:
        """Note the outcome for the metrics and for the forecast."""
        if group.kind == "eval":
            return
        is_informative = outcome == "ready"
        num_correct = group.num_correct
        window, size = self.state.window, len(group.indices)
        if len(window.by_correct) != size + 1:
            window.by_correct = [0] * (size + 1)
        window.by_correct[num_correct] += 1
        window.groups += 1
        window.informative += is_informative
        if not is_informative:
            self.state.unmeasured[group.group_id] = num_correct > 0
        self.count("groups_informative", int(is_informative))

    def _on_wasted(self, event: ev.Wasted) -> None:
        self.state.leases[event.lease_id].counted_late += event.indices
        self.count(f"tokens_{event.cause}", event.tokens)
        self.count("tokens_delivered", event.tokens)

    def _on_partials_dropped(self, event: ev.PartialsDropped) -> None:
        group = self.state.groups[event.group_id]
        self.count("tokens_stale", sum(group.partials.values()))
        self.freed += group.drop_partials()

    def _on_group_dropped(self, event: ev.GroupDropped) -> None:
        group = self.state.groups[event.group_id]
        self._settle(group, event.state)
        if event.state == "parked" and group.kind == "train":
            self.state.parked_rows.setdefault(group.row, group.group_id)
        if event.is_returned:
            entry = Returned(group.position, group.row, group.failures, group.deaths)
            bisect.insort(self.state.returned, entry)

    def _settle(self, group: Group, state: GroupState) -> None:
        """Move a group on; what it no longer needs is freed, what it wasted is counted."""
        if state != "ready":
            self.count(f"tokens_{state}", group.num_tokens())
        if state not in ("ready", "taken"):
            self.freed += [r.record_id for r in group.responses.values() if r.record_id is not None]
            self.freed += group.drop_partials()
        self.count(f"{group.kind}_{group.state}", -1)
        self.count(f"{group.kind}_{state}")
        self.index.count_open(group, -1)
        group.state = state
        self.index.settle(group)

    # batches

    def _on_pass_opened(self, _: ev.PassOpened) -> None:
        self.state.passes += 1

    def _on_batch_closed(self, event: ev.BatchClosed) -> None:
        for group_id in event.group_ids:
            group = self.state.groups[group_id]
            self._settle(group, "taken")
            group.step = event.step
        self.state.batches[event.step] = Batch(
            step=event.step,
            group_ids=list(event.group_ids),
            expected_groups=event.expected_groups,
            is_short=event.is_short,
            min_step=event.min_step,
            is_filtered=event.is_filtered,
            digest=self.batch_digest(event.group_ids),
            metrics=dict(event.metrics),
        )
        self.state.current_step = event.step + 1
        self.state.actor_stats = dict(event.actor_stats)
        self.state.window = Window()
        self._remember(event)

    def _remember(self, event: ev.BatchClosed) -> None:
        """Take what was measured before the cut into the history."""
        old = self.state.history
        if len(old) != len(event.measured):
            old = [0.0] * len(event.measured)
        self.state.history = [
            HISTORY_DECAY * was + new for was, new in zip(old, event.measured, strict=True)
        ]
        self.state.unmeasured = {
            k: v for k, v in self.state.unmeasured.items() if k > event.measured_to
        }

    def batch_digest(self, group_ids: list[int]) -> bytes:
        """sha256 of the digests of all responses of these groups, in order."""
        digest = hashlib.sha256()
        for group_id in group_ids:
            responses = self.state.groups[group_id].responses
            for index in sorted(responses):
                digest.update(responses[index].sha256)
        return digest.digest()

    def _on_committed(self, event: ev.Committed) -> None:
        """Forget released batches, and groups that ended without being taken."""
        self.state.committed_step = event.step
        for group in list(self.state.groups.values()):
            is_released = group.step is not None and group.step <= event.step
            if is_released or (group.kind, group.state) in _ENDED:
                self._purge(group)
        self.state.batches = {k: v for k, v in self.state.batches.items() if k > event.step}

    def _on_archived(self, event: ev.Archived) -> None:
        self.state.archive.append(event.record_id)
        self._record_written(event.record_id)

    def _purge(self, group: Group) -> None:
        self.forgotten.append(GroupRow.of(group, self.state.leases))
        if group.state == "taken":
            self.freed += group.record_ids()
        if group.kind == "train":
            self.state.purged[group.state] = self.state.purged.get(group.state, 0) + 1
        for lease_id in group.lease_ids:
            del self.state.leases[lease_id]
        del self.state.groups[group.group_id]

    # versions and evaluations

    def _on_registered(self, event: ev.Registered) -> None:
        self.state.lineage = event.lineage
        self.state.is_finished = False
        self.state.rollbacks.append(Rollback(event.lineage, event.step))
        self.state.newest = None
        for evaluation in list(self.state.evaluations):
            if self.is_abandoned(evaluation.version):
                self.state.evaluations.remove(evaluation)
                self._purge_ended(evaluation)
        self.state.results = [r for r in self.state.results if not self.is_abandoned(r.version)]

    def _purge_ended(self, evaluation: Evaluation) -> None:
        """The open units of an abandoned evaluation are quarantined by events of their own."""
        for group_id in evaluation.group_ids:
            if self.state.groups[group_id].state != "open":
                self._purge(self.state.groups[group_id])

    def _on_published(self, event: ev.Published) -> None:
        """A pending evaluation of the same step moves to the new lineage: the same weights."""
        newest = self.state.newest
        self.state.newest = event.version if newest is None else max(newest, event.version)
        for evaluation in self.state.evaluations:
            if evaluation.version.step == event.version.step:
                evaluation.version = event.version
                self.index.waiting_version += 1
                for group_id in evaluation.group_ids:
                    self.state.groups[group_id].version = event.version
        if event.evaluation is not None:
            self._plan_evaluation(event.version, event.evaluation)

    def _plan_evaluation(self, version: PolicyVersion, plan: ev.EvaluationPlan) -> None:
        first_id = self.state.next_group_id
        for row in range(plan.num_prompts):
            for start in range(0, plan.num_samples, plan.unit_size):
                stop = min(start + plan.unit_size, plan.num_samples)
                self._add(
                    Group(
                        group_id=self.state.next_group_id,
                        kind="eval",
                        row=row,
                        position=-1,
                        version=version,
                        indices=list(range(start, stop)),
                    )
                )
        self.state.evaluations.append(
            Evaluation(
                version=version,
                num_prompts=plan.num_prompts,
                num_samples=plan.num_samples,
                group_ids=list(range(first_id, self.state.next_group_id)),
            )
        )

    def _on_evaluated(self, event: ev.Evaluated) -> None:
        version = event.result.version
        done = next(e for e in self.state.evaluations if e.version == version)
        self.state.evaluations.remove(done)
        self.state.results.append(event.result)
        for group_id in done.group_ids:
            self._purge(self.state.groups[group_id])

    def _on_finished(self, _: ev.Finished) -> None:
        self.state.is_finished = True

    # small steps of several events

    def _add(self, group: Group) -> None:
        self.state.groups[group.group_id] = group
        self.state.next_group_id = group.group_id + 1
        self.count(f"{group.kind}_open")
        self.index.add(group)

    def _record_written(self, record_id: int) -> None:
        self.state.next_record_id = max(self.state.next_record_id, record_id + 1)
