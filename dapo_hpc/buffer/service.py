"""The core behind HTTPS: one event loop that decides, one thread that writes.

A handler lets the core decide, hands its effects to the writer, and answers when they are on disk.
A request that waits for something to happen sleeps until the core says that something did.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from dapo_hpc.buffer import events as ev
from dapo_hpc.buffer import messages as msg
from dapo_hpc.buffer.core import Core, LineageFenced
from dapo_hpc.buffer.gate import ADMITTED, LimitBodies, RequireToken, Room
from dapo_hpc.buffer.requests import call_id_of, read, sealed_submit
from dapo_hpc.buffer.writer import Job, Writer
from dapo_hpc.run_dir import RunDir, write_json

log = logging.getLogger(__name__)

MAX_TOKENS_BYTES = 256 * 2**20
"""The longest body of a request that carries tokens."""
MAX_BODY_BYTES = 64 * 2**10
"""The longest body of any other."""
MAX_BODIES_BYTES = 2**30
"""Of all requests that are not answered yet."""
WRITING_BYTES = 6 * 2**20
"""Of submits that are decided and not on disk yet. Replies leave in the order of the decisions, so
a heartbeat waits for these, and for no other submit."""
MAX_WAIT_S = 300.0
"""Longest time a request is held, whatever it asks for."""
TICK_S = 0.2
"""Between two looks at the lease deadlines."""
STATUS_S = 1.0
"""Least time between two snapshots for `dapo status`."""
OWNER_S = 1.0
"""Between two looks for a newer owner when there is nothing to write. A buffer that nobody speaks
to any more, because a successor was here and died, must end, so that it is started again."""
SNAPSHOT_EVENTS = 100_000
"""Events in the ledger from one snapshot to the next, if no commit is cause for one before."""
LINGER_S = 10.0
"""After the run is complete and every live actor was told."""


class Service:
    """The HTTP face of one core."""

    def __init__(
        self,
        core: Core,
        writer: Writer,
        run: RunDir,
        *,
        token: str,
        incarnation: int,
        on_fatal: Callable[[BaseException], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._writer = writer
        self._run = run
        self._incarnation = incarnation
        self._on_fatal = on_fatal
        self._clock = clock
        self._writing = Room(WRITING_BYTES)
        self._news = asyncio.Event()
        self._wakeups = core.book.wakeups
        self._is_draining = False
        self._is_changed = True
        self._said: set[str] = set()
        self.is_over = asyncio.Event()
        """The run is complete, everybody was told, and the time to linger is over."""
        self._num_events = self._event_bytes = 0
        """Since the last snapshot."""
        self._snapshot_bytes = 0
        """Of the last snapshot."""
        self.routes = self._build_routes()
        self.app = self._build_app(token)

    def drain(self) -> None:
        """Answer every waiting request at once, with what there is."""
        self._is_draining = True
        self._news.set()

    def _build_routes(self) -> list[Route]:
        handlers: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "lease": self._lease,
            "heartbeat": self._heartbeat,
            "submit": self._submit,
            "release": self._release,
            "register": self._register,
            "take": self._take,
            "fetch": self._fetch,
            "publish": self._publish,
            "commit": self._commit,
            "evaluations": self._evaluations,
            "finish": self._finish,
        }
        posts = [
            Route(f"/v1/{verb}", self._admitted(handler), methods=["POST"])
            for verb, handler in handlers.items()
        ]
        return [*posts, Route("/v1/status", self._admitted(self._status))]

    def _build_app(self, token: str) -> RequireToken:
        app = Starlette(
            routes=self.routes,
            lifespan=self._lifespan,
            exception_handlers={
                LineageFenced: _answer_with(409),
                ValueError: _answer_with(400),
                TimeoutError: _answer_with(408),
                ClientDisconnect: _answer_with(400),  # it died while it spoke; nobody reads this
                HTTPException: _no_endpoint,
                Exception: self._fail,
            },
        )
        limits = {f"/v1/{verb}": MAX_TOKENS_BYTES for verb in ("heartbeat", "submit", "release")}
        limited = LimitBodies(app, limits=limits, default=MAX_BODY_BYTES, total=MAX_BODIES_BYTES)
        return RequireToken(limited, token)

    def _admitted(
        self, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """I10, a second time: a request that did not pass the gate reaches no handler."""

        async def guarded(request: Request) -> Response:
            if not request.scope.get(ADMITTED):
                sentence = f"I10: {request.url.path} was reached past the gate."
                self._core.desk.audit.note([sentence])
                return PlainTextResponse("the request was not admitted.", 403)
            try:
                return await handler(request)
            except (LineageFenced, ValueError):
                await self._hand_over()  # nor does it refuse for what is not on disk
                raise

        return guarded

    # actors

    async def _lease(self, request: Request) -> Response:
        asked = await read(request, msg.LeaseRequest)
        call_id = call_id_of(request)
        until = self._clock() + min(asked.wait_s, MAX_WAIT_S)
        while not await request.is_disconnected():
            reply = self._core.lease(asked, self._clock(), call_id)
            if Core.is_news(asked, reply) or not await self._wait(until):
                return await self._reply(reply)
        return Response(status_code=204)

    async def _heartbeat(self, request: Request) -> Response:
        asked = await read(request, msg.HeartbeatRequest)
        reply = self._core.heartbeat(asked, self._clock())
        written = self._hand_over()
        if not is_quick(asked, reply):
            await written
        return _packed(reply)

    async def _submit(self, request: Request) -> Response:
        body = await request.body()
        asked, sealed = await asyncio.to_thread(sealed_submit, body)
        async with self._writing.held(len(body)):
            return await self._reply(self._core.submit(asked, self._clock(), sealed))

    async def _release(self, request: Request) -> Response:
        asked = await read(request, msg.ReleaseRequest)
        self._core.release(asked, self._clock())
        return await self._reply(msg.Empty())

    # the learner

    async def _register(self, request: Request) -> Response:
        asked = await read(request, msg.RegisterRequest)
        return await self._reply(self._core.register(asked, self._clock()))

    async def _take(self, request: Request) -> Response:
        asked = await read(request, msg.TakeRequest)
        until = self._clock() + min(asked.wait_s, MAX_WAIT_S)
        while True:
            reply = self._core.take(asked, self._clock())
            if reply.groups is not None or not await self._wait(until):
                break
        return await self._reply(replace(reply, metrics=reply.metrics | _process_metrics()))

    async def _fetch(self, request: Request) -> Response:
        asked = await read(request, msg.FetchRequest)
        return await asyncio.to_thread(lambda: _packed(self._core.fetch(asked)))

    async def _publish(self, request: Request) -> Response:
        asked = await read(request, msg.PublishRequest)
        self._core.publish(asked, self._clock())
        return await self._reply(msg.Empty())

    async def _commit(self, request: Request) -> Response:
        asked = await read(request, msg.CommitRequest)
        self._core.commit(asked, self._clock())
        return await self._reply(msg.Empty(), is_commit=True)

    async def _evaluations(self, request: Request) -> Response:
        await read(request, msg.Empty)
        return await self._reply(self._core.evaluations(self._clock()))

    async def _finish(self, request: Request) -> Response:
        self._core.finish(await read(request, msg.FinishRequest))
        return await self._reply(msg.Empty())

    async def _status(self, _: Request) -> Response:
        return JSONResponse(self._snapshot())

    # durability

    async def _reply(self, reply: Any, *, is_commit: bool = False) -> Response:
        """Answer once everything decided so far is on disk."""
        await self._hand_over(is_commit=is_commit)
        return _packed(reply)

    def _hand_over(self, *, is_commit: bool = False) -> asyncio.Future[None]:
        """Give the core's effects to the writer. The future is done when they are durable."""
        effects = self._core.take_effects()
        events = [ev.encode_event(event) for event in effects.events]
        self._num_events += len(events)
        self._event_bytes += sum(map(len, events))
        for notice in effects.notices:
            log.warning("%s", notice)
        self._is_changed = True
        if self._core.book.wakeups != self._wakeups:
            self._wakeups = self._core.book.wakeups
            self._wake()
        loop = asyncio.get_running_loop()
        written: asyncio.Future[None] = loop.create_future()
        self._writer.put(
            Job(
                events=events,
                payloads=effects.payloads,
                freed=effects.freed,
                snapshot=self._state_if_due(is_commit=is_commit),
                done=partial(_resolve_from_thread, loop, written),
            )
        )
        return written

    def _state_if_due(self, *, is_commit: bool) -> bytes | None:
        """A snapshot: at a commit, which has just forgotten much, once the events since the last
        take as much room as that did. So it costs no more than they do, however large the state."""
        is_worth_it = is_commit and self._event_bytes >= self._snapshot_bytes
        if not (is_worth_it or self._num_events >= SNAPSHOT_EVENTS):
            return None
        snapshot = self._core.book.snapshot()
        self._snapshot_bytes = len(snapshot)
        self._num_events = self._event_bytes = 0
        return snapshot

    async def _wait(self, until: float) -> bool:
        """Sleep until something happened. False: the time is over, or the service drains."""
        self._hand_over_if_any()
        left_s = until - self._clock()
        if left_s <= 0 or self._is_draining:
            return False
        try:
            await asyncio.wait_for(self._news.wait(), left_s)
        except TimeoutError:
            return False
        return not self._is_draining

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    # the background

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(self._keep_time())
        task.add_done_callback(self._watch)
        yield
        task.cancel()
        self._write(self._snapshot())

    def _watch(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._on_fatal(error)

    async def _keep_time(self) -> None:
        """Let leases expire, write the snapshot, and notice the end of the run."""
        told_at: float | None = None
        status_at = owner_at = 0.0
        while True:
            now = self._clock()
            self._core.tick(now)
            self._hand_over_if_any()
            if now >= owner_at + OWNER_S:
                owner_at = now
                self._writer.put(Job.nothing())
            if self._is_changed and now >= status_at + STATUS_S:
                status_at, self._is_changed = now, False
                self._report_violations()
                await asyncio.to_thread(self._write, self._snapshot())
            told_at = (told_at or now) if self._core.is_everyone_told(now) else None
            if told_at is not None and now >= told_at + LINGER_S:
                self.is_over.set()
            await asyncio.sleep(TICK_S)

    def _hand_over_if_any(self) -> None:
        if self._core.desk.events or self._core.desk.notices:
            self._hand_over()

    def _report_violations(self) -> None:
        for sentence in self._core.check():
            if sentence not in self._said:
                self._said.add(sentence)
                log.error("invariant violated: %s", sentence)

    def _snapshot(self) -> dict[str, Any]:
        status = self._core.status(self._clock())
        return {
            "unix_s": time.time(),
            "incarnation": self._incarnation,
            "requests_without_token": self.app.num_refused,
            **status,
        }

    def _write(self, snapshot: dict[str, Any]) -> None:
        """The snapshot is for people: a full disk must not end the buffer."""
        try:
            write_json(self._run.status, snapshot)
        except OSError as error:
            log.warning("%s is not written: %s.", self._run.status, error)

    async def _fail(self, _: Request, error: Exception) -> Response:
        """Anything but a caller's mistake: what is in memory may be wrong, so end the process."""
        self._on_fatal(error)
        return PlainTextResponse(str(error), status_code=500)


async def _no_endpoint(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 400
    sentence = f"{request.method} {request.url.path} is not an endpoint of this buffer."
    return PlainTextResponse(sentence, status)


def is_quick(asked: msg.HeartbeatRequest, reply: msg.HeartbeatReply) -> bool:
    """A heartbeat that brings nothing and loses nothing promises nothing: no need for the disk.

    One whose tokens are known waits too: it may repeat one whose tokens are not on disk yet.
    """
    return not (reply.lost or reply.abort or any(lease.new_tokens for lease in asked.leases))


def _packed(reply: Any) -> Response:
    return Response(msg.encode(reply), media_type="application/msgpack")


def _answer_with(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(_: Request, error: Exception) -> Response:
        return PlainTextResponse(str(error), status_code=status)

    return answer


def _resolve_from_thread(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
    loop.call_soon_threadsafe(_resolve, future)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _process_metrics() -> dict[str, float]:
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"buffer/cpu_s": time.process_time(), "buffer/peak_memory_mib": peak_kib / 1024}
