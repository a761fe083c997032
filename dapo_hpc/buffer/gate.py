"""What a request must pass before the service looks at it: the token, then room for its body.

Both answer without reading the body. Bodies of a declared size alone are read, so that what all
requests together hold in memory has a bound.
"""

from __future__ import annotations

import asyncio
import hmac
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_S = 60.0
"""A body of which nothing arrives for this long is given up."""
POLICY_VIOLATION = 1008
"""The code that closes a WebSocket which nobody asked for."""
ADMITTED = "dapo_is_admitted"
"""Set in the scope of a request that showed the token."""


class RequireToken:
    """Lets nothing through, not even a body, without the run's bearer token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()
        self.num_refused = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
        elif hmac.compare_digest(_given(scope), self._expected):
            scope[ADMITTED] = True
            await self._app(scope, receive, send)
        else:
            self.num_refused += 1
            await _refuse(401, "the request does not carry this run's token.", scope, receive, send)


def _given(scope: Scope) -> bytes:
    given: bytes = dict(scope["headers"]).get(b"authorization", b"")
    return given


class Room:
    """So many bytes that requests share; first come, first served."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._held = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def held(self, size: int) -> AsyncIterator[None]:
        """Hold `size` bytes, or all there are, when there is room for them."""
        size = min(size, self._total)
        if self._waiting or self._held + size > self._total:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((size, turn))
            try:
                await turn
            except asyncio.CancelledError:
                # It may have got its room in the same moment.
                self._give_back(0 if turn.cancelled() else size)
                raise
        else:
            self._held += size
        try:
            yield
        finally:
            self._give_back(size)

    def _give_back(self, size: int) -> None:
        self._held -= size
        while self._waiting:
            size, turn = self._waiting[0]
            if not turn.cancelled():
                if self._held + size > self._total:
                    break
                self._held += size
                turn.set_result(None)
            self._waiting.popleft()


class LimitBodies:
    """Bounds each body, and the sum of all bodies whose requests are not answered yet.

    A request whose body finds no room waits; its bytes stay in the sender's socket meanwhile.
    """

    def __init__(
        self, app: ASGIApp, *, limits: Mapping[str, int], default: int, total: int
    ) -> None:
        """Bytes: `limits` by path, `default` for other paths, `total` for all together."""
        self._app = app
        self._limits, self._default, self._total = limits, default, total
        self._room = Room(total)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = min(self._limits.get(scope["path"], self._default), self._total)
        size, refusal = _declared_size(scope, limit)
        if refusal is not None:
            await _refuse(*refusal, scope, receive, send)
            return
        async with self._room.held(size):
            await self._app(scope, _timed(receive), send)


def _declared_size(scope: Scope, limit: int) -> tuple[int, tuple[int, str] | None]:
    """(bytes of the body, None), or (0, (status, sentence))."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    if b"transfer-encoding" in headers:
        return 0, (411, "a body without Content-Length is not read; send its size.")
    text = headers.get(b"content-length", b"0")
    if not text.isdigit():
        return 0, (400, f"Content-Length is {text[:40]!r}; expected a number of bytes.")
    if len(text) > len(str(limit)) or int(text) > limit:
        sentence = (
            f"a body of {text[:40].decode()} bytes; {scope['path']} reads at most {limit}. Send "
            "less at once."
        )
        return 0, (413, sentence)
    return int(text), None


def _timed(receive: Receive) -> Receive:
    """Raises TimeoutError when a body stops arriving."""
    is_complete = False

    async def receive_in_time() -> Message:
        nonlocal is_complete
        if is_complete:
            return await receive()
        async with asyncio.timeout(BODY_S):
            message = await receive()
        is_complete = not message.get("more_body", False)
        return message

    return receive_in_time


async def _refuse(status: int, sentence: str, *asgi: Any) -> None:
    scope, receive, send = asgi
    # The body is not read, so the connection cannot be used again.
    headers = {"Connection": "close"}
    await PlainTextResponse(sentence, status, headers)(scope, receive, send)
