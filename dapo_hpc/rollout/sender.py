"""Sends finished responses to the buffer: soon, in few requests, and never twice in doubt."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from dapo_hpc.records import Response

GATHER_S = 0.1
"""Responses of one lease that end within this time travel together. A small model ends hundreds in
a second; with half this time, the requests cost a tenth of its processor time."""
NUM_REQUESTS = 8
"""At a time; each waits for the buffer's disk, and many leases end together."""


@dataclass(slots=True)
class _Parcel:
    due_s: float
    responses: list[Response] = field(default_factory=list)


class Sender:
    """Gathers responses by lease and calls `submit` from threads of its own.

    `submit(lease_id, responses)` itself retries; what it raises goes to `on_failure`.
    """

    def __init__(
        self,
        submit: Callable[[int, list[Response]], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._submit, self._on_failure = submit, on_failure
        self._parcels: dict[int, _Parcel] = {}
        self._is_closed = False
        self._changed = threading.Condition()
        self._executor = ThreadPoolExecutor(NUM_REQUESTS, thread_name_prefix="submit")
        threading.Thread(target=self._run, name="sender", daemon=True).start()

    def add(self, lease_id: int, response: Response, *, is_last: bool) -> None:
        """Send soon; at once when it is the last of its lease."""
        with self._changed:
            parcel = self._parcels.setdefault(lease_id, _Parcel(time.monotonic() + GATHER_S))
            parcel.responses.append(response)
            if is_last:
                parcel.due_s = 0.0
            self._changed.notify_all()

    def close(self) -> None:
        """Stop; what is not delivered yet is forgotten."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._is_closed:
                    return
                now_s = time.monotonic()
                due = [k for k, parcel in self._parcels.items() if parcel.due_s <= now_s]
                for lease_id in due:
                    responses = self._parcels.pop(lease_id).responses
                    self._executor.submit(self._deliver, lease_id, responses)
                if not due:
                    self._changed.wait(self._next_due_in_s(now_s))

    def _next_due_in_s(self, now_s: float) -> float | None:
        if not self._parcels:
            return None
        return max(0.0, min(parcel.due_s for parcel in self._parcels.values()) - now_s)

    def _deliver(self, lease_id: int, responses: list[Response]) -> None:
        try:
            self._submit(lease_id, responses)
        except BaseException as error:  # the engine's thread raises it
            self._on_failure(error)
