"""One dispatched prompt and its responses: the states of a group and of a lease.

                        +--> ready ----> taken            (in the batch of one step)
    open --(complete)---+--> all_correct | all_wrong      (uniform: nothing to learn)
      |                 +--> stale
      |                 +--> evaluated                    (an evaluation unit)
      +--> surplus      past the end of a batch, max_staleness = 0; ready groups too
      +--> stale        a token is older than the bound; ready groups too
      +--> quarantined  sampled by weights of an abandoned lineage; ready groups too
      +--> parked       failed max_attempts times, or killed its actors

A group is leased to one actor at a time. Whoever ends a lease makes the group wait for its next.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from dapo_hpc.records import GroupSummary, LeaseKind, PolicyVersion

GroupState = Literal[
    "open",
    "ready",
    "taken",
    "all_correct",
    "all_wrong",
    "stale",
    "surplus",
    "quarantined",
    "parked",
    "evaluated",
]
LeaseEnd = Literal["expired", "released", "failed", "crashed", "aborted"]
"""'failed': the actor says that this prompt failed. 'crashed': its engine did, with several."""
LeaseState = Literal["live", "complete", "expired", "released", "failed", "crashed", "aborted"]
WasteCause = Literal[
    "all_correct",
    "all_wrong",
    "stale",
    "surplus",
    "quarantined",
    "parked",
    "preempted",
    "duplicate",
]

LIVE_STATES: tuple[GroupState, ...] = ("open", "ready")


class StoredResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A finished response as the core knows it; its tokens lie in a payload record."""

    index: int
    lease_id: int
    """The lease that filled the index."""
    record_id: int | None
    """None: the content is not kept (evaluation)."""
    sha256: bytes
    """Of the encoded response."""
    num_tokens: int
    reward: float
    is_correct: bool
    is_truncated: bool
    versions: tuple[PolicyVersion, ...]
    """All that sampled a token of it."""


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """A record with new tokens of unfinished responses: what one heartbeat brought of a group."""

    record_id: int
    indices: tuple[int, ...]
    versions: tuple[PolicyVersion, ...]
    """All that sampled a token of it."""


class LeaseRecord(msgspec.Struct, kw_only=True):
    """Who may fill which indices of a group."""

    lease_id: int
    group_id: int
    actor: str
    version: PolicyVersion
    """What the actor held when it got the lease."""
    indices: list[int]
    call_id: str
    """Of the call that it answered."""
    state: LeaseState = "live"
    is_proven: bool = False
    """It brought a token or a response."""
    counted_late: list[int] = []
    """Indices whose tokens, sent too late, are already counted as wasted."""


class Group(msgspec.Struct, kw_only=True):
    """A prompt, dispatched once."""

    group_id: int
    kind: LeaseKind
    row: int
    position: int
    """In the prompt order; -1 for an evaluation."""
    version: PolicyVersion | None
    """Evaluation: the version that must sample it."""
    indices: list[int]
    failures: int = 0
    """Failed attempts of the prompt, those of earlier dispatches included."""
    deaths: int = 0
    """Actors lost in a row before they sampled a token of it; see suspects.py."""
    state: GroupState = "open"
    lease_id: int | None = None
    """The live lease."""
    lease_ids: list[int] = []
    """All leases granted, oldest first."""
    responses: dict[int, StoredResponse] = {}
    partials: dict[int, int] = {}
    """Stored tokens of each unfinished response."""
    chunks: list[Chunk] = []
    """Where these lie, oldest first."""
    step: int | None = None
    """The batch that holds it."""

    @property
    def is_complete(self) -> bool:
        return len(self.responses) == len(self.indices)

    @property
    def num_correct(self) -> int:
        return sum(response.is_correct for response in self.responses.values())

    @property
    def last_lease_id(self) -> int | None:
        """The newest lease, live or not: the only one that may fill an index."""
        return self.lease_ids[-1] if self.lease_ids else None

    @property
    def is_waiting(self) -> bool:
        """Open, and nobody holds a lease."""
        return self.state == "open" and self.lease_id is None

    def missing(self) -> list[int]:
        return [index for index in self.indices if index not in self.responses]

    @property
    def num_missing(self) -> int:
        return len(self.indices) - len(self.responses)

    def known_tokens(self, index: int) -> int:
        """Tokens of an unfinished response that are stored."""
        return self.partials.get(index, 0)

    def num_tokens(self) -> int:
        """All stored tokens, of finished and unfinished responses."""
        return sum(r.num_tokens for r in self.responses.values()) + sum(self.partials.values())

    def response_versions(self) -> set[PolicyVersion]:
        return {v for response in self.responses.values() for v in response.versions}

    def partial_versions(self) -> set[PolicyVersion]:
        return {version for chunk in self.chunks for version in chunk.versions}

    def drop_partial(self, index: int) -> list[int]:
        """Forget the tokens of an unfinished response. Returns the records nothing else needs."""
        if self.partials.pop(index, None) is None:
            return []
        chunks, self.chunks = self.chunks, []
        freed = []
        for chunk in chunks:
            if self.partials.keys().isdisjoint(chunk.indices):
                freed.append(chunk.record_id)
            else:
                self.chunks.append(chunk)
        return freed

    def drop_partials(self) -> list[int]:
        """Forget those of all. Returns the records."""
        chunks, self.chunks, self.partials = self.chunks, [], {}
        return [chunk.record_id for chunk in chunks]

    def record_ids(self) -> list[int]:
        """Payload records this group needs."""
        stored = [r.record_id for r in self.responses.values() if r.record_id is not None]
        return stored + [chunk.record_id for chunk in self.chunks]

    def summary(self, num_prompt_tokens: int) -> GroupSummary:
        """What the learner plans with. The group must be complete."""
        responses = [self.responses[index] for index in self.indices]
        steps = [version.step for version in self.response_versions()]
        return GroupSummary(
            group_id=self.group_id,
            prompt_row=self.row,
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=tuple(r.num_tokens for r in responses),
            rewards=tuple(r.reward for r in responses),
            is_correct=tuple(r.is_correct for r in responses),
            is_truncated=tuple(r.is_truncated for r in responses),
            min_step=min(steps),
            max_step=max(steps),
        )


def uniform_state(outcomes: Iterable[bool]) -> Literal["all_correct", "all_wrong"] | None:
    """Which uniform state the outcomes of a complete group are, or None: informative.

    Exact equality of raw outcomes, never a threshold on a standard deviation.
    """
    outcomes = list(outcomes)
    if all(outcomes):
        return "all_correct"
    return None if any(outcomes) else "all_wrong"
