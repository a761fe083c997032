"""Sends finished responses to the buffer: soon, in few requests, and never twice in doubt."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from dapo_hpc.buffer.messages import LeaseResponses
from dapo_hpc.records import Response

GATHER_S = 0.1
"""What ends within this time travels together. A small model ends hundreds in a second; one request
for each would cost more processor time than sampling them."""
GATHER_LAST_S = 0.02
"""The same from the last response of a lease on: a batch may be waiting for it."""


class Sender:
    """Gathers responses and calls `submit` from a thread of its own.

    While a request is under way the next one gathers. `submit` itself retries; what it raises goes
    to `on_failure`, and nothing is sent after that.
    """

    def __init__(
        self,
        submit: Callable[[list[LeaseResponses]], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._submit, self._on_failure = submit, on_failure
        self._gathered: dict[int, list[Response]] = {}
        self._due_s = 0.0
        self._is_closed = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="sender", daemon=True).start()

    def add(self, lease_id: int, response: Response, *, is_last: bool) -> None:
        """Send soon; sooner when it is the last of its lease."""
        due_s = time.monotonic() + (GATHER_LAST_S if is_last else GATHER_S)
        with self._changed:
            self._due_s = min(self._due_s, due_s) if self._gathered else due_s
            self._gathered.setdefault(lease_id, []).append(response)
            self._changed.notify()

    def close(self) -> None:
        """Stop; what is not delivered yet is forgotten."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def _run(self) -> None:
        try:
            while finished := self._next():
                self._submit(finished)
        except BaseException as error:  # the engine's thread raises it
            self._on_failure(error)

    def _next(self) -> list[LeaseResponses]:
        """Wait until something is due; nothing: closed."""
        with self._changed:
            while not self._is_closed:
                left_s = self._due_s - time.monotonic()
                if self._gathered and left_s <= 0:
                    gathered, self._gathered = self._gathered, {}
                    return [LeaseResponses(lease_id=k, responses=v) for k, v in gathered.items()]
                self._changed.wait(left_s if self._gathered else None)
        return []
