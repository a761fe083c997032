"""Bugs put into the buffer on purpose: the simulation must find every one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from dapo_hpc.buffer import book, desk, events, intake, writer
from dapo_hpc.buffer.group import Group, LeaseRecord
from dapo_hpc.buffer.owner import Ownership
from tests.chaos import buffer_node


@dataclass(frozen=True, slots=True)
class Plant:
    owner: Any
    name: str
    wrong: Callable[..., Any]
    found_as: tuple[str, ...]
    """First words of problems that show it."""


_attempt = writer.Writer.attempt
_lease_ended = book.Book._on_lease_ended


def _reply_then_write(self: writer.Writer, jobs: list[writer.Job]) -> None:
    for job in jobs:
        job.done()
    _attempt(self, jobs)


def _is_quick_with_tokens(_: Any, reply: Any) -> bool:
    return not (reply.lost or reply.abort)


def _accept_again(
    _: desk.Desk, __: LeaseRecord, group: Group, ___: Any, ____: bytes
) -> intake.Verdict:
    return "stored" if group.state == "open" else "fenced"


def _begin_anew(self: book.Book, event: events.LeaseEnded) -> None:
    group = self.state.groups[self.state.leases[event.lease_id].group_id]
    self.freed += group.drop_partials()
    _lease_ended(self, event)


def _never_fenced(self: Ownership) -> None:
    """Whoever has taken over."""


def _release_one_more(self: book.Book, event: events.Committed) -> None:
    _committed(self, events.Committed(step=event.step + 1))


_committed = book.Book._on_committed


def _keep_all_tokens(part: Any, offset: int, start: int) -> Any:
    """Also those that are stored already."""
    del offset, start
    return part


PLANTS: dict[str, Plant] = {
    "ack before fsync": Plant(
        writer.Writer, "attempt", _reply_then_write, ("lost", "refused", "redrawn", "duplicated")
    ),
    "repeated heartbeat acked before fsync": Plant(
        buffer_node, "is_quick", _is_quick_with_tokens, ("lost", "refused", "redrawn")
    ),
    "expired lease accepted twice": Plant(
        intake, "_verdict", _accept_again, ("duplicated", "fenced", "refused")
    ),
    "killed group redrawn from scratch": Plant(
        book.Book, "_on_lease_ended", _begin_anew, ("redrawn", "refused")
    ),
    "zombie owner acks": Plant(
        Ownership, "check", _never_fenced, ("lost", "refused", "changed", "unfenced", "redrawn")
    ),
    "commit releases too much": Plant(
        book.Book, "_on_committed", _release_one_more, ("lost", "refused", "changed")
    ),
    "heartbeat tokens stored twice": Plant(
        intake, "cut_start", _keep_all_tokens, ("unexpected", "refused", "invariant")
    ),
}


@contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Run with one bug; None: with none."""
    if name is None:
        yield
        return
    plant = PLANTS[name]
    with mock.patch.object(plant.owner, plant.name, plant.wrong):
        yield
