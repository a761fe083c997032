"""The real service in a thread of this process, on a real socket with TLS, for tests that look at
its memory and state while they speak to it."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from dapo_hpc import config
from dapo_hpc.buffer import auth, server
from dapo_hpc.buffer.endpoint import publish_endpoint
from dapo_hpc.buffer.service import Service
from dapo_hpc.buffer.writer import Writer
from dapo_hpc.run_dir import RunDir

LIMIT_S = 20.0


class ServedBuffer:
    """`open_buffer` and the service of a run; `fatal` holds what would have ended the process."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.fatal: list[BaseException] = []
        auth.create_auth(run)
        self.opened = server.open_buffer(run, config.load(run.config))
        self.writer = Writer(
            self.opened.store,
            self.opened.owner.check,
            self.fatal.append,
            full_mark=run.disk_full,
        )
        self.token = auth.token(run)
        self._context = auth.client_context(run)
        self._listener = server._listen(range(1))
        self.port = self._listener.getsockname()[1]
        self.service: Service
        self._server: uvicorn.Server
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    async def _serve(self) -> None:
        self.service = Service(
            self.opened.core,
            self.writer,
            self.run,
            token=self.token,
            incarnation=self.opened.owner.incarnation,
            on_fatal=self.fatal.append,
        )
        self._server = uvicorn.Server(server._uvicorn_config(self.run, self.service))
        await self._server.serve(sockets=[self._listener])

    def start(self) -> None:
        self.writer.start()
        self._thread.start()
        deadline_s = time.monotonic() + LIMIT_S
        while not getattr(getattr(self, "_server", None), "started", False):
            assert time.monotonic() < deadline_s, "the service does not start"
            time.sleep(0.01)
        publish_endpoint(self.run, self.port, self.opened.owner.incarnation)

    def stop(self) -> None:
        self.service.drain()
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(LIMIT_S)
        self.writer.stop()
        self.opened.close()

    def paths(self) -> list[tuple[str, str]]:
        """(method, path) of every endpoint, read from the service's own routes."""
        return [
            (method, route.path)
            for route in self.service.routes
            for method in sorted((route.methods or set()) - {"HEAD"})
        ]

    def state(self) -> bytes:
        """Everything durable, as bytes."""
        return self.opened.core.book.snapshot()

    @contextmanager
    def connection(self) -> Iterator[ssl.SSLSocket]:
        """A TLS connection to speak any bytes on."""
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT_S) as plain,
            self._context.wrap_socket(plain, server_hostname=auth.SERVER_NAME) as secret,
        ):
            yield secret

    def say(self, content: bytes) -> bytes:
        """The raw answer to raw bytes; empty when the service closes without one."""
        with self.connection() as secret:
            try:
                secret.sendall(content)
                return read_answer(secret)
            except (ConnectionError, ssl.SSLError):
                return b""

    def ask(
        self, method: str, path: str, body: bytes = b"", *, token: str | None = None
    ) -> tuple[int, bytes]:
        """(status, body) of one request; `token` None: the right one."""
        lines = [
            f"{method} {path} HTTP/1.1",
            "Host: dapo-buffer",
            f"Authorization: Bearer {self.token if token is None else token}",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        return parsed(self.say("\r\n".join(lines).encode() + b"\r\n\r\n" + body))


def read_answer(secret: ssl.SSLSocket) -> bytes:
    """All bytes until the end of the connection, or until the declared body is complete."""
    answer = b""
    while piece := secret.recv(65536):
        answer += piece
        head, separator, body = answer.partition(b"\r\n\r\n")
        lengths = [x for x in head.lower().split(b"\r\n") if x.startswith(b"content-length:")]
        if separator and lengths and len(body) >= int(lengths[0].partition(b":")[2]):
            break
    return answer


def parsed(answer: bytes) -> tuple[int, bytes]:
    """(status, body); status 0 for no answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split(b" ")[1]) if head.startswith(b"HTTP/1.1 ") else 0), body
