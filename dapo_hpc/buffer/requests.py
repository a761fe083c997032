"""What the service reads of a request: its message, and the name of the call."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec
from starlette.requests import Request

from dapo_hpc.buffer import messages as msg
from dapo_hpc.buffer.core import Core
from dapo_hpc.buffer.segments import Record

CALL_HEADER = "dapo-call"
MAX_CALL_ID = 64
"""Characters."""


async def read(request: Request, kind: type) -> Any:
    """The message in a body. Raises ValueError for any other body."""
    return _message(await request.body(), kind)


def sealed_submit(body: bytes) -> tuple[msg.SubmitRequest, list[list[Record]]]:
    """A submit, decoded and hashed. Any thread: it takes milliseconds, in which others are served.

    Raises ValueError for any other body.
    """
    asked: msg.SubmitRequest = _message(body, msg.SubmitRequest)
    return asked, Core.seal(asked)


def _message(body: bytes, kind: type) -> Any:
    try:
        return msg.decode(body, kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"the body is not a {kind.__name__}: {error}") from None


def call_id_of(request: Request) -> str:
    """What names this call and its repetitions."""
    call_id = request.headers.get(CALL_HEADER) or uuid.uuid4().hex
    if len(call_id) > MAX_CALL_ID:
        raise ValueError(
            f"the header {CALL_HEADER} has {len(call_id)} characters; at most {MAX_CALL_ID}."
        )
    return call_id
