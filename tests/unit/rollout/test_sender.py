"""Finished responses travel soon and in few requests."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from dapo_hpc.buffer.messages import LeaseResponses
from dapo_hpc.records import Response
from dapo_hpc.rollout.sender import GATHER_S, Sender

LIMIT_S = 10.0

Sent = queue.SimpleQueue[tuple[float, dict[int, list[int]]]]


def response(index: int) -> Response:
    return Response(
        index=index,
        token_ids=np.zeros(1, np.int32),
        rollout_logprobs=np.zeros(1, np.float32),
        spans=(),
        finish_reason="stop",
        is_correct=True,
        reward=1.0,
    )


@pytest.fixture
def sent() -> Sent:
    """(time, indices by lease) of each request."""
    return queue.SimpleQueue()


@pytest.fixture
def sender(sent: Sent) -> Iterator[Sender]:
    def submit(finished: list[LeaseResponses]) -> None:
        sent.put((time.monotonic(), contents(finished)))

    sender = Sender(submit, on_failure=lambda error: pytest.fail(str(error)))
    yield sender
    sender.close()


def contents(finished: list[LeaseResponses]) -> dict[int, list[int]]:
    return {part.lease_id: [r.index for r in part.responses] for part in finished}


def test_responses_are_gathered(sender: Sender, sent: Sent) -> None:
    started_s = time.monotonic()
    for index in range(5):
        sender.add(1 + index % 2, response(index), is_last=False)
    sent_s, leases = sent.get(timeout=LIMIT_S)
    assert leases == {1: [0, 2, 4], 2: [1, 3]}
    assert sent_s - started_s >= GATHER_S
    assert sent.empty()


def test_the_last_response_of_a_lease_goes_soon_and_takes_the_others_along(
    sender: Sender, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dapo_hpc.rollout.sender.GATHER_S", LIMIT_S)
    sender.add(1, response(0), is_last=False)
    sender.add(2, response(0), is_last=False)
    sender.add(1, response(1), is_last=True)
    _, leases = sent.get(timeout=LIMIT_S / 2)
    assert leases == {1: [0, 1], 2: [0]}
    assert sent.empty()


def test_what_ends_during_a_request_goes_with_the_next(sent: Sent) -> None:
    is_under_way, may_end = threading.Event(), threading.Event()

    def submit(finished: list[LeaseResponses]) -> None:
        is_under_way.set()
        may_end.wait(LIMIT_S)
        sent.put((time.monotonic(), contents(finished)))

    sender = Sender(submit, on_failure=lambda _: None)
    sender.add(1, response(0), is_last=True)
    assert is_under_way.wait(LIMIT_S)
    for lease_id in (2, 3, 4):
        sender.add(lease_id, response(0), is_last=True)
    may_end.set()
    assert [sent.get(timeout=LIMIT_S)[1] for _ in range(2)] == [{1: [0]}, {2: [0], 3: [0], 4: [0]}]
    sender.close()


def test_what_submit_raises_is_reported() -> None:
    failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def submit(finished: list[LeaseResponses]) -> None:
        raise ValueError(f"{contents(finished)} refused")

    sender = Sender(submit, on_failure=failures.put)
    sender.add(7, response(0), is_last=True)
    assert str(failures.get(timeout=LIMIT_S)) == "{7: [0]} refused"
    sender.close()
