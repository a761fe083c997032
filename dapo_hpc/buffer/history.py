"""What became of each group, kept for the whole run in a few dozen bytes each.

A commit forgets groups; what is worth knowing of them goes into a compressed block first. A block
is a payload record like any other, written with the commit that forgets its groups, and never
freed.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import msgspec

from dapo_hpc.buffer.group import Group, GroupState, LeaseRecord, StoredResponse
from dapo_hpc.records import LeaseKind

MAX_BLOCK_BYTES = 2**28
"""Of a block when it is unpacked."""


class ResponseRow(msgspec.Struct, frozen=True, array_like=True):
    """One response, without its tokens."""

    index: int
    num_tokens: int
    reward: float
    is_correct: bool
    is_truncated: bool
    min_step: int
    max_step: int
    actor: int
    """Who finished it: a place in the group's actors."""


class GroupRow(msgspec.Struct, frozen=True, array_like=True):
    """One dispatch of a prompt."""

    group_id: int
    kind: LeaseKind
    row: int
    position: int
    """In the prompt order; -1 for an evaluation."""
    state: GroupState
    step: int | None
    """The batch that held it."""
    failures: int
    num_leases: int
    actors: list[str]
    """Of its leases, in order of their first."""
    responses: list[ResponseRow]

    @classmethod
    def of(cls, group: Group, leases: Mapping[int, LeaseRecord]) -> GroupRow:
        actors = list(dict.fromkeys(leases[lease_id].actor for lease_id in group.lease_ids))
        place = {lease_id: actors.index(leases[lease_id].actor) for lease_id in group.lease_ids}
        responses = sorted(group.responses.values(), key=lambda response: response.index)
        return cls(
            group.group_id,
            group.kind,
            group.row,
            group.position,
            group.state,
            group.step,
            group.failures,
            len(group.lease_ids),
            actors,
            [_response_row(response, place[response.lease_id]) for response in responses],
        )


def _response_row(response: StoredResponse, actor: int) -> ResponseRow:
    steps = [version.step for version in response.versions]
    return ResponseRow(
        response.index,
        response.num_tokens,
        response.reward,
        response.is_correct,
        response.is_truncated,
        min(steps),
        max(steps),
        actor,
    )


def encode_block(rows: Sequence[GroupRow]) -> bytes:
    return zlib.compress(msgspec.msgpack.encode(rows), level=9)


def decode_block(content: bytes) -> list[GroupRow]:
    """The inverse of encode_block. Raises ValueError for anything else."""
    unpacker = zlib.decompressobj()
    try:
        plain = unpacker.decompress(content, MAX_BLOCK_BYTES)
    except zlib.error as error:
        raise ValueError(f"a block of the history is damaged: {error}.") from None
    return msgspec.msgpack.decode(plain, type=list[GroupRow])
