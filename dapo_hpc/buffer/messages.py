"""What actors, the learner and the buffer say to each other.

Messages are msgpack (msgspec) of the dataclasses below and of `dapo_hpc.records`. An array travels
as an extension with a one-byte type code followed by its raw little-endian values. Nothing here
can execute code on arrival, unlike pickle.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from dapo_hpc.records import (
    EvalResult,
    GroupSummary,
    Lease,
    PartialResponse,
    PolicyVersion,
    Prompt,
    Response,
)

ARRAY_EXTENSION = 1
ARRAY_TYPES = {b"i": np.dtype("<i4"), b"f": np.dtype("<f4")}
_CODES = {dtype: code for code, dtype in ARRAY_TYPES.items()}

MAX_FETCH_GROUPS = 64
"""Groups in one reply, which bounds its size."""

# What a peer claims is bounded where it is decoded: not a number, and no number without an end.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Amount = Annotated[float, msgspec.Meta(ge=0.0, le=1e15)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
ActorName = Annotated[str, msgspec.Meta(max_length=256, pattern=r"^[!-~]+\Z")]
"""Unique for one life of one actor process; visible ASCII, because it goes into logs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorStats:
    """What an actor has done since it started; cumulative."""

    generated_tokens: Count = 0
    finished_responses: Count = 0
    busy_s: Amount = 0.0
    """Seconds in which the engine had work."""
    idle_s: Amount = 0.0
    cpu_s: Amount = 0.0
    """Of the process and its scoring workers."""
    peak_memory_mib: Amount = 0.0
    verifier_timeouts: Count = 0
    engine_restarts: Count = 0
    probe_mean_diff: Amount = 0.0
    """Mean |learner - engine| log-prob (nats) on the probes of the version now loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRequest:
    actor: ActorName
    version: PolicyVersion | None
    """The weights the actor holds; None before its first load."""
    max_responses: Count
    """Free places in the engine; the buffer grants whole prompts, at least one if it fits."""
    wait_s: Seconds
    """How long the buffer may hold the request when there is nothing to hand out."""
    stats: ActorStats


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseReply:
    leases: list[Lease]
    newest: PolicyVersion | None
    """Newest published version; the actor loads it when it holds another one."""
    abort: list[int]
    """Lease ids of this actor that are worth nothing any more (batch closed): stop sampling."""
    is_done: bool
    """The run is complete: exit 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseProgress:
    """A lease held, with the tokens sampled since the last acknowledged heartbeat."""

    lease_id: int
    new_tokens: list[PartialResponse]
    """token_ids, rollout_logprobs and spans hold only what is new; `offsets` says from where. Spans
    start at their token of the response, so the first one of a piece starts at its offset."""
    offsets: list[int]
    """For each of new_tokens, the number of tokens acknowledged before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatRequest:
    actor: ActorName
    version: PolicyVersion | None
    leases: list[LeaseProgress]
    stats: ActorStats


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatReply:
    lost: list[int]
    """Leases this actor does not hold (expired, leased anew): drop the work."""
    abort: list[int]
    newest: PolicyVersion | None
    is_done: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseResponses:
    """Finished responses of one lease."""

    lease_id: int
    responses: list[Response]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitRequest:
    actor: ActorName
    leases: list[LeaseResponses]
    stats: ActorStats


Verdict = Literal["stored", "fenced"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitReply:
    verdicts: list[list[Verdict]]
    """For each lease, one for each response. 'stored': it is on disk, now or from an earlier try.
    'fenced': the index was leased anew, or its group was given up; drop it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRequest:
    """Hand leases back before they expire: drain, or a failure of the engine."""

    actor: ActorName
    leases: list[LeaseProgress]
    is_failure: bool
    """True counts as a failed attempt of the prompt; a drain does not. With several leases it is
    the engine that failed, and any of their prompts may be the cause."""
    stats: ActorStats | None = None
    """The actor's last words, so that what it sampled is known; None: unchanged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterRequest:
    """The learner starts or resumes from a checkpoint of `step` trained steps (0: none)."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterReply:
    lineage: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeRequest:
    lineage: int
    step: int
    """The step to train next, from 1."""
    wait_s: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeReply:
    groups: list[GroupSummary] | None
    """None: not closed yet, ask again."""
    metrics: dict[str, float] = field(default_factory=dict)
    """`buffer/*` and `actor/*` figures at the moment the batch closed (see observe.metrics)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRequest:
    group_ids: Annotated[list[int], msgspec.Meta(max_length=MAX_FETCH_GROUPS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredGroup:
    """A group as it lies on disk: the reader verifies each record before it decodes it."""

    group_id: int
    prompt: Prompt
    records: list[bytes]
    """[G] encoded `Response`, ordered by index."""
    sha256: list[bytes]
    """[G] digests, taken when the buffer received the responses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchReply:
    groups: list[StoredGroup]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishRequest:
    version: PolicyVersion
    """Its directory `weights/<version.name>` is complete and durable."""
    is_evaluated: bool
    """Evaluate it: hand out evaluation leases pinned to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRequest:
    """Steps up to `step` can never be asked for again: the oldest retained checkpoint is there."""

    lineage: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishRequest:
    """Nothing is left to train or evaluate: actors may exit."""

    lineage: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationsReply:
    results: list[EvalResult]
    """All finished ones of this run's surviving history, oldest first."""
    num_pending: int
    versions_in_use: list[PolicyVersion]
    """Named by a live actor or a pending evaluation: their weights must stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Empty:
    pass


def encode(message: Any) -> bytes:
    """msgpack bytes of a message or record."""
    return _ENCODER.encode(message)


def decode(content: bytes, kind: type) -> Any:
    """A message of the given type. Raises msgspec.ValidationError, a ValueError, otherwise."""
    return msgspec.msgpack.decode(
        content, type=kind, ext_hook=_array_from_extension, dec_hook=_hook
    )


def _array_to_extension(value: Any) -> msgspec.msgpack.Ext:
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype in _CODES:
        return msgspec.msgpack.Ext(ARRAY_EXTENSION, _CODES[value.dtype] + value.tobytes())
    described = (
        f"{value.dtype} array of shape {value.shape}"
        if isinstance(value, np.ndarray)
        else type(value).__name__
    )
    raise NotImplementedError(f"cannot send {described}; expected a 1-D int32 or float32 array.")


def _array_from_extension(code: int, content: memoryview) -> np.ndarray:
    dtype = ARRAY_TYPES.get(bytes(content[:1]))
    if code != ARRAY_EXTENSION or dtype is None or (len(content) - 1) % dtype.itemsize:
        raise ValueError(f"extension {code} of {len(content)} bytes is no array of this protocol.")
    return np.frombuffer(content, dtype=dtype, offset=1).copy()


def _hook(kind: type, value: Any) -> Any:
    if kind is np.ndarray and isinstance(value, np.ndarray):
        return value
    raise ValueError(f"expected an array, got {type(value).__name__}.")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_array_to_extension)
