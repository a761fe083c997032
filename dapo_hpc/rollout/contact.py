"""An actor's conversation with the buffer, in threads beside the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

from dapo_hpc.buffer.client import BufferUnreachable
from dapo_hpc.buffer.messages import (
    HeartbeatReply,
    HeartbeatRequest,
    LeaseReply,
    LeaseRequest,
    ReleaseRequest,
    SubmitReply,
    SubmitRequest,
)
from dapo_hpc.records import Lease, PolicyVersion

LONG_POLL_S = 2.0
"""How long the buffer may hold a lease request; also how long a drain waits for its reply."""
PACE_S = 0.02
"""Between looks at the free places of a busy engine, and after a reply that brought nothing."""
NEWS_PER_HEARTBEAT = 20
"""A busy engine without room for a group still asks for news this often: its work may be worth
nothing any more."""


class Buffer(Protocol):
    """What an actor asks of the buffer; dapo_hpc.buffer.client.BufferClient provides it.

    Each call is repeated until it is answered, or raises BufferUnreachable.
    """

    def lease(self, request: LeaseRequest) -> LeaseReply: ...
    def heartbeat(self, request: HeartbeatRequest) -> HeartbeatReply: ...
    def submit(self, request: SubmitRequest) -> SubmitReply: ...
    def release(self, request: ReleaseRequest) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What a reply of the buffer means for the engine."""

    leases: tuple[Lease, ...] = ()
    dropped: tuple[int, ...] = ()
    """Leases that are lost or worth nothing any more."""
    newest: PolicyVersion | None = None
    """None: the reply did not say."""
    is_done: bool = False
    is_lease_reply: bool = False


Mail = SimpleQueue[News | BaseException | None]
"""To the engine's thread: news, a failure of another thread, or None to wake it."""


class Contact:
    """Leases in the background and keeps the held leases alive; news goes to `mail`.

    After each lease reply it waits for `settle`, so that the next request counts the places the
    last leases took. `lease_request` sets wait_s = 0 when the engine has no room for a group.
    """

    def __init__(
        self,
        buffer: Buffer,
        mail: Mail,
        *,
        lease_request: Callable[[], LeaseRequest],
        heartbeat_request: Callable[[], HeartbeatRequest],
        acknowledge: Callable[[HeartbeatRequest], None],
        heartbeat_s: float,
    ) -> None:
        self._buffer, self._mail = buffer, mail
        self._lease_request, self._heartbeat_request = lease_request, heartbeat_request
        self._acknowledge = acknowledge
        self._heartbeat_s = heartbeat_s
        self._stopped = threading.Event()
        self._settled = threading.Event()
        self._threads = [
            threading.Thread(target=self._guarded, args=(target,), name=name, daemon=True)
            for name, target in (("lease", self._lease), ("heartbeat", self._beat))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def settle(self) -> None:
        """The last lease reply is worked in."""
        self._settled.set()

    def stop(self) -> None:
        """Ask for nothing more; returns when the last reply is in the mail, or is not coming."""
        self._stopped.set()
        self._settled.set()
        deadline_s = time.monotonic() + LONG_POLL_S + 0.5
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _guarded(self, target: Callable[[], None]) -> None:
        try:
            target()
        except BufferUnreachable as error:
            if not self._stopped.is_set():
                self._mail.put(error)
        except BaseException as error:  # the engine's thread raises it
            self._mail.put(error)

    def _lease(self) -> None:
        while not self._stopped.is_set():
            self._settled.clear()
            request = self._useful_request()
            reply = self._buffer.lease(request)
            self._mail.put(
                News(
                    leases=tuple(reply.leases),
                    dropped=tuple(reply.abort),
                    newest=reply.newest,
                    is_done=reply.is_done,
                    is_lease_reply=True,
                )
            )
            self._settled.wait()
            if not reply.leases:
                self._stopped.wait(PACE_S)

    def _useful_request(self) -> LeaseRequest:
        """A request with room for a group; after a while without room, one for news only.

        A request that is held while there is no room would keep the places that become free in the
        meantime empty.
        """
        deadline_s = time.monotonic() + self._heartbeat_s / NEWS_PER_HEARTBEAT
        while True:
            request = self._lease_request()
            is_due = request.wait_s > 0 or time.monotonic() >= deadline_s
            if is_due or self._stopped.wait(PACE_S):
                return request

    def _beat(self) -> None:
        """Heartbeats. A late reply may name an older version than the last lease reply did, so
        that only the latter says what is newest."""
        while not self._stopped.wait(self._heartbeat_s):
            request = self._heartbeat_request()
            reply = self._buffer.heartbeat(request)
            self._acknowledge(request)
            self._mail.put(News(dropped=(*reply.lost, *reply.abort), is_done=reply.is_done))
