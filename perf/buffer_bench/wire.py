"""One connection to the buffer. A generator of load that is slower than what it loads is worthless,
so this is not the client that actors use; it speaks the same bytes."""

from __future__ import annotations

import asyncio
from typing import Any

from dapo_hpc.buffer import auth
from dapo_hpc.buffer import messages as msg
from dapo_hpc.buffer.endpoint import read_endpoint
from dapo_hpc.run_dir import RunDir


class Wire:
    """POST after POST on one TLS connection."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str
    ) -> None:
        self._reader, self._writer = reader, writer
        self._token = token

    @classmethod
    async def open(cls, run: RunDir, port: int | None = None) -> Wire:
        """To the buffer of a run, or to another server that holds its certificate."""
        streams = await asyncio.open_connection(
            "127.0.0.1",
            port or read_endpoint(run).port,
            ssl=auth.client_context(run),
            server_hostname=auth.SERVER_NAME,
        )
        return cls(*streams, auth.token(run))

    async def call(self, verb: str, message: Any, kind: type) -> Any:
        return msg.decode(await self.post(verb, msg.encode(message)), kind)

    async def post(self, verb: str, body: bytes) -> bytes:
        """The answer's body. Raises RuntimeError for any status but 200."""
        head = (
            f"POST /v1/{verb} HTTP/1.1\r\nHost: buffer\r\nAuthorization: Bearer {self._token}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode())
        self._writer.write(body)
        await self._writer.drain()
        answer = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(answer.partition("content-length: ")[2].partition("\r\n")[0])
        content = await self._reader.readexactly(length)
        if not answer.startswith("http/1.1 200"):
            raise RuntimeError(f"{verb}: {answer.partition(chr(13))[0]}: {content[:300]!r}")
        return content

    def close(self) -> None:
        self._writer.close()
