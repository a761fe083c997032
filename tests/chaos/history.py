"""What the clients did and what they were told. The checker reads this, nothing of the service."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dapo_hpc.buffer import messages as msg
from dapo_hpc.records import PartialResponse, PolicyVersion, Response


@dataclass(slots=True)
class Attempt:
    """One response under one lease, as its actor sampled it."""

    lease_id: int
    actor: str
    version: PolicyVersion
    """What the actor held when it got the lease."""
    known: PartialResponse
    """What the lease said an earlier actor had sampled."""
    token_ids: np.ndarray
    """All of them, the known ones included; those not yet sampled at a kill never existed."""
    acked_tokens: int = 0
    """Of a heartbeat that was answered."""
    sent_tokens: int = 0
    """Of a heartbeat that was sent."""
    sent_sha: str = ""
    is_acked: bool = False
    """The buffer answered 'stored'."""


@dataclass(slots=True)
class GroupHistory:
    group_id: int
    row: int
    kind: str
    attempts: dict[int, list[Attempt]] = field(default_factory=dict)
    """By index, in the order in which the actors heard of them."""


@dataclass(slots=True)
class Batch:
    step: int
    lineage: int
    """Of the learner that took it first."""
    group_ids: list[int]
    num_taken: int = 1


@dataclass
class History:
    """Notes of all clients of a world."""

    staleness: int
    group_size: int
    is_filtered: bool
    groups: dict[int, GroupHistory] = field(default_factory=dict)
    batches: dict[int, Batch] = field(default_factory=dict)
    forgotten: int = 0
    """Groups up to this one are released: what there was to check was checked."""
    lineages: set[int] = field(default_factory=set)
    """Given to learners."""
    asked_step: int = 0
    """The newest that a learner asked to commit."""
    committed_step: int = 0
    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    samples: list[np.ndarray] | None = None
    """The tokens of each trained response; None: not kept."""
    num_released: int = 0
    """Batches checked and forgotten."""
    on_commit: Callable[[], None] | None = None

    # actors

    def leased(self, lease: msg.Lease, attempts: dict[int, Attempt]) -> None:
        group = self.groups.setdefault(
            lease.group_id, GroupHistory(lease.group_id, lease.prompt.row, lease.kind)
        )
        for index, attempt in attempts.items():
            group.attempts.setdefault(index, []).append(attempt)

    # the learner

    def registered(self, lineage: int) -> None:
        if lineage in self.lineages:
            self.problems.append(f"unfenced: two learners were given lineage {lineage}.")
        self.lineages.add(lineage)

    def took(self, step: int, lineage: int, groups: list[msg.StoredGroup]) -> None:
        """A learner has a batch, and verifies it before it trains."""
        if step <= self.committed_step:
            return  # it slept; a newer learner had the batch released
        group_ids = [group.group_id for group in groups]
        known = self.batches.get(step)
        if known is not None:
            known.num_taken += 1
            self.counts["batches taken again"] += 1
            if known.group_ids != group_ids:
                self.problems.append(
                    f"changed: batch {step} was {known.group_ids}, now it is {group_ids}."
                )
            return
        self.batches[step] = Batch(step, lineage, group_ids)
        for group in groups:
            self._verify(step, group)

    def _verify(self, step: int, stored: msg.StoredGroup) -> None:
        where = f"group {stored.group_id} of batch {step}"
        for other in self.batches.values():
            if other.step != step and stored.group_id in other.group_ids:
                self.problems.append(f"duplicated: {where} is in batch {other.step} too.")
        self.counts["groups trained"] += 1
        outcomes = set()
        for index, record in enumerate(stored.records):
            response: Response = msg.decode(record, Response)
            outcomes.add(response.is_correct)
            self._verify_response(where, stored.group_id, index, record, response)
            oldest = min(span.version.step for span in response.spans)
            if step - 1 - oldest > self.staleness:
                self.problems.append(f"stale: {where} holds tokens of step {oldest}.")
        if len(stored.records) != self.group_size:
            self.problems.append(f"size: {where} has {len(stored.records)} responses.")
        if self.is_filtered and len(outcomes) != 2:
            self.problems.append(f"uniform: {where} teaches nothing.")

    def _verify_response(
        self, where: str, group_id: int, index: int, record: bytes, response: Response
    ) -> None:
        sha = hashlib.sha256(record).hexdigest()
        group = self.groups.get(group_id)
        sent = [a for a in (group.attempts.get(index, []) if group else []) if a.sent_sha == sha]
        if response.index != index or not sent:
            self.problems.append(f"unexpected: {where}: no actor sent response {index}.")
            return
        self.counts["responses trained"] += 1
        self.counts["responses recovered"] += not sent[-1].is_acked
        self.counts["responses continued"] += len(sent[-1].known.token_ids) > 0
        if self.samples is not None:
            self.samples.append(response.token_ids)

    def committed(self, step: int) -> None:
        """Batches up to `step` are released."""
        self.committed_step = max(self.committed_step, step)
        released = [k for k in self.batches if k <= step]
        last = max((max(self.batches[k].group_ids) for k in released), default=0)
        self.forgotten = max(self.forgotten, last)
        for group_id in [k for k in self.groups if k <= self.forgotten]:
            self.check_group(self.groups.pop(group_id))
        for k in released:
            del self.batches[k]
        self.num_released += len(released)
        if self.on_commit is not None:
            self.on_commit()

    # what can be seen in the clients' notes alone

    def check_group(self, group: GroupHistory) -> None:
        for index, attempts in group.attempts.items():
            attempts.sort(key=lambda attempt: attempt.lease_id)
            self._check_attempts(f"group {group.group_id}, response {index}", attempts)

    def _check_attempts(self, where: str, attempts: list[Attempt]) -> None:
        acked = [attempt for attempt in attempts if attempt.is_acked]
        self.counts["responses acknowledged"] += bool(acked)
        if len({attempt.sent_sha for attempt in acked}) > 1:
            self.problems.append(f"duplicated: {where} was stored twice with different content.")
        for attempt in acked:
            newest = attempts[-1].lease_id
            if attempt.lease_id < newest:
                self.problems.append(
                    f"fenced: {where}: lease {attempt.lease_id} filled it although lease {newest} "
                    "was handed out to fill it."
                )
        for before, after in zip(attempts, attempts[1:], strict=False):
            if before.lease_id != after.lease_id:
                self._check_continued(where, before, after)

    def _check_continued(self, where: str, before: Attempt, after: Attempt) -> None:
        """The next actor goes on with what the last one was told is durable."""
        num_known = len(after.known.token_ids)
        is_same = np.array_equal(after.known.token_ids, before.token_ids[:num_known])
        if num_known < before.acked_tokens and not self._may_start_anew(before, after):
            self.problems.append(
                f"redrawn: {where}: {before.acked_tokens} tokens were acknowledged under lease "
                f"{before.lease_id}, lease {after.lease_id} has {num_known}."
            )
        elif not is_same or num_known > max(before.sent_tokens, len(before.known.token_ids)):
            self.problems.append(
                f"unexpected: {where}: the {num_known} tokens of lease {after.lease_id} are not "
                f"what lease {before.lease_id} sent."
            )
        self.counts["tokens continued"] += num_known

    def _may_start_anew(self, before: Attempt, after: Attempt) -> bool:
        """Tokens older than the bound are dropped; an actor gets work only with the newest weights,
        and the batch being filled is then at most `staleness` steps ahead of them."""
        spans = before.known.spans
        oldest = min([span.version.step for span in spans] + [before.version.step])
        return oldest < after.version.step or after.version.lineage > before.version.lineage
