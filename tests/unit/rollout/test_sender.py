"""Finished responses travel soon and in few requests."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator

import numpy as np
import pytest

from dapo_hpc.records import Response
from dapo_hpc.rollout.sender import GATHER_S, Sender

LIMIT_S = 10.0

Sent = queue.SimpleQueue[tuple[float, int, list[int]]]


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
    """(time, lease, indices) of each request."""
    return queue.SimpleQueue()


@pytest.fixture
def sender(sent: Sent) -> Iterator[Sender]:
    def submit(lease_id: int, responses: list[Response]) -> None:
        sent.put((time.monotonic(), lease_id, [r.index for r in responses]))

    sender = Sender(submit, on_failure=lambda error: pytest.fail(str(error)))
    yield sender
    sender.close()


def test_responses_of_one_lease_are_gathered(sender: Sender, sent: Sent) -> None:
    started_s = time.monotonic()
    for index in range(5):
        sender.add(1, response(index), is_last=False)
    sent_s, lease_id, indices = sent.get(timeout=LIMIT_S)
    assert (lease_id, indices) == (1, [0, 1, 2, 3, 4])
    assert sent_s - started_s >= GATHER_S
    assert sent.empty()


def test_the_last_response_of_a_lease_waits_for_nothing(
    sender: Sender, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dapo_hpc.rollout.sender.GATHER_S", LIMIT_S)
    sender.add(1, response(0), is_last=False)
    sender.add(2, response(0), is_last=False)
    sender.add(1, response(1), is_last=True)
    sent_s, lease_id, indices = sent.get(timeout=LIMIT_S / 2)
    assert (lease_id, indices) == (1, [0, 1])
    assert sent.empty()


def test_a_slow_request_does_not_hold_up_another_lease(sent: Sent) -> None:
    def submit(lease_id: int, responses: list[Response]) -> None:
        if lease_id == 1:
            time.sleep(1.0)
        sent.put((time.monotonic(), lease_id, [r.index for r in responses]))

    sender = Sender(submit, on_failure=lambda _: None)
    sender.add(1, response(0), is_last=True)
    sender.add(2, response(0), is_last=True)
    assert [sent.get(timeout=LIMIT_S)[1] for _ in range(2)] == [2, 1]
    sender.close()


def test_what_submit_raises_is_reported() -> None:
    failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def submit(lease_id: int, responses: list[Response]) -> None:
        raise ValueError(f"lease {lease_id}: {len(responses)} refused")

    sender = Sender(submit, on_failure=failures.put)
    sender.add(7, response(0), is_last=True)
    assert str(failures.get(timeout=LIMIT_S)) == "lease 7: 1 refused"
    sender.close()
