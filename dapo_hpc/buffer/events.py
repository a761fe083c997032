"""Everything that can happen to the buffer. The ledger is the list of these, in order.

An event holds the decision, not the reason: applying it needs no config, no clock and no payload,
so that a ledger replays to the same state under any later config.
"""

from __future__ import annotations

import msgspec

from dapo_hpc.buffer.group import GroupState, LeaseEnd, StoredResponse, WasteCause
from dapo_hpc.buffer.messages import ActorStats
from dapo_hpc.records import EvalResult, PolicyVersion


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Base of all events; the tag is the class name."""


class Dispatched(Event, frozen=True, kw_only=True, tag=True):
    """A prompt became a group: the head of the returned prompts, or the next of the order."""

    group_id: int
    position: int
    row: int
    is_returned: bool
    failures: int
    deaths: int
    group_size: int


class Leased(Event, frozen=True, kw_only=True, tag=True):
    lease_id: int
    group_id: int
    actor: str
    version: PolicyVersion
    indices: list[int]
    call_id: str
    """Names the actor's call; a repetition of it gets the same leases."""


class Progressed(Event, frozen=True, kw_only=True, tag=True):
    """New tokens of unfinished responses, in one record."""

    lease_id: int
    record_id: int
    num_tokens: dict[int, int]
    """By index."""
    versions: tuple[PolicyVersion, ...]


class Stored(Event, frozen=True, kw_only=True, tag=True):
    """Finished responses; `outcome` is the group's new state when they completed it."""

    lease_id: int
    responses: list[StoredResponse]
    outcome: GroupState | None


class LeaseEnded(Event, frozen=True, kw_only=True, tag=True):
    lease_id: int
    cause: LeaseEnd


class PartialsDropped(Event, frozen=True, kw_only=True, tag=True):
    """The unfinished responses of a group start anew: their tokens are too old."""

    group_id: int


class GroupDropped(Event, frozen=True, kw_only=True, tag=True):
    """A live group leaves; its prompt returns to the head of the order unless it is parked."""

    group_id: int
    state: GroupState
    is_returned: bool


class PassOpened(Event, frozen=True, kw_only=True, tag=True):
    """The order may go on with another pass over the prompts."""


class BatchClosed(Event, frozen=True, kw_only=True, tag=True):
    step: int
    group_ids: list[int]
    expected_groups: int
    is_short: bool
    min_step: int
    """The staleness bound it was formed under."""
    is_filtered: bool
    """Dynamic sampling: no group in it is uniform."""
    measured: list[int]
    """Groups that finished before the cut, by number of correct responses."""
    measured_to: int
    """Groups up to this id are measured, or never will be."""
    metrics: dict[str, float]
    actor_stats: dict[str, ActorStats]


class Registered(Event, frozen=True, kw_only=True, tag=True):
    """The learner (re)started from `step`: what older lineages did after it is abandoned."""

    lineage: int
    step: int


class EvaluationPlan(msgspec.Struct, frozen=True, kw_only=True):
    num_prompts: int
    num_samples: int
    unit_size: int
    """Responses leased together."""


class Published(Event, frozen=True, kw_only=True, tag=True):
    version: PolicyVersion
    evaluation: EvaluationPlan | None


class Evaluated(Event, frozen=True, kw_only=True, tag=True):
    result: EvalResult


class Wasted(Event, frozen=True, kw_only=True, tag=True):
    """Tokens that came for an ended lease."""

    lease_id: int
    indices: list[int]
    cause: WasteCause
    tokens: int


class Archived(Event, frozen=True, kw_only=True, tag=True):
    """What the groups forgotten since the last one became is in a record; see history.py."""

    record_id: int


class Committed(Event, frozen=True, kw_only=True, tag=True):
    step: int


class Finished(Event, frozen=True, kw_only=True, tag=True):
    """The run is complete."""


AnyEvent = (
    Dispatched
    | Leased
    | Progressed
    | Stored
    | LeaseEnded
    | PartialsDropped
    | GroupDropped
    | PassOpened
    | BatchClosed
    | Registered
    | Published
    | Evaluated
    | Wasted
    | Archived
    | Committed
    | Finished
)

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(AnyEvent)


def encode_event(event: AnyEvent) -> bytes:
    """msgpack, tagged with the class name."""
    return _ENCODER.encode(event)


def decode_event(body: bytes) -> AnyEvent:
    """The inverse of encode_event. Raises msgspec.ValidationError for anything else."""
    event: AnyEvent = _DECODER.decode(body)
    return event
