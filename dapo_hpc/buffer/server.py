"""One life of the buffer process: own, inherit, replay, serve, close."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import uvicorn
import uvloop

from dapo_hpc.buffer import auth, owner
from dapo_hpc.buffer.book import Book
from dapo_hpc.buffer.core import BufferSettings, Core, Prompts
from dapo_hpc.buffer.endpoint import publish_endpoint
from dapo_hpc.buffer.events import decode_event
from dapo_hpc.buffer.ledger import Ledger
from dapo_hpc.buffer.prompt_table import PromptTable
from dapo_hpc.buffer.segments import NO_SPACE, Segments
from dapo_hpc.buffer.service import Service
from dapo_hpc.buffer.writer import FULL_RETRY_S, LOG_EVERY, Store, Writer
from dapo_hpc.config import RunConfig
from dapo_hpc.observe.log import exit_with_cause
from dapo_hpc.prompts.order import PromptOrder
from dapo_hpc.run_dir import RunDir

log = logging.getLogger(__name__)

DRAIN_S = 5
"""For requests in flight after SIGTERM."""
FLUSH_S = 0.2
"""For the last bytes of the last answers."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of malloc.h."""
SWITCH_S = 0.0005
"""After which the writer's thread gets its turn. It asks for one after each call of the disk."""
KEPT_BYTES = 256 * 2**20
"""Of memory that is free, kept for the next bodies."""
BACKLOG = 2048
"""Connections that wait until the service takes them."""


@dataclass(slots=True)
class OpenBuffer:
    """The core with its open disk."""

    core: Core
    store: Store
    owner: owner.Ownership

    def close(self) -> None:
        self.store.close()


def open_buffer(run: RunDir, config: RunConfig) -> OpenBuffer:
    """Own the run's buffer and bring back the state of its ledger.

    Raises OwnerFenced when another process is faster, ValueError when files are missing or damaged.
    """
    owned = owner.take_ownership(run.buffer)
    store, book = inherit(owned, config.buffer.request_timeout_s)
    core = Core(
        BufferSettings.from_config(config),
        read_prompts(run, config),
        store.read,
        now=time.monotonic(),
        book=book,
    )
    return OpenBuffer(core, store, owned)


def inherit(
    owned: owner.Ownership, request_timeout_s: float, sleep: Callable[[float], None] = time.sleep
) -> tuple[Store, Book]:
    """What the predecessor left, as our own.

    Raises OwnerFenced, or ValueError when files are missing or damaged.
    """
    try:
        _inherit_ledger(owned, request_timeout_s, sleep)
        ledger = Ledger(owned.ledger)
        store = Store(ledger, Segments(owned.ledger, owned.incarnation))
        store.recover()
        book = replay(ledger)
        owner.remove_old_ledgers(owned)
    except (OSError, ValueError):
        owned.check()  # a successor removes what it has copied
        raise
    return store, book


def _inherit_ledger(
    owned: owner.Ownership, request_timeout_s: float, sleep: Callable[[float], None]
) -> None:
    """Copying needs space: wait for it as for that of a group commit."""
    attempt = 1
    while True:
        try:
            owner.inherit_ledger(owned, request_timeout_s, sleep)
            return
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            if attempt % LOG_EVERY == 1:
                log.error(
                    "the disk of the run directory is full (%s, attempt %d); the ledger cannot be "
                    "copied, nothing is served. Free space; next attempt in %.0f s.",
                    error, attempt, FULL_RETRY_S,
                )  # fmt: skip
            attempt += 1
            sleep(FULL_RETRY_S)
            owned.check()


def replay(ledger: Ledger) -> Book:
    """The state after all events of the ledger."""
    book = Book.from_snapshot(ledger.snapshot())
    for body in ledger.events():
        book.apply(decode_event(body))
    book.freed.clear()
    return book


def read_prompts(run: RunDir, config: RunConfig) -> Prompts:
    train = PromptTable(run.train_prompts)
    held_out = PromptTable(run.eval_prompts) if run.eval_prompts.exists() else []
    return Prompts(train, held_out, PromptOrder(len(train), config.run.seed))


def serve(
    run: RunDir,
    config: RunConfig,
    *,
    ports: range | None = None,
    interface: str | None = None,
) -> None:
    """Serve until SIGTERM or SIGUSR2, or until the run is complete and everybody knows.

    Args:
        run: whose buffer it is.
        config: of the run.
        ports: that the cluster allows; None: any.
        interface: network interface to be reached at, as in ib0; None: any.
    """
    auth.create_auth(run)
    _keep_freed_memory()
    sys.setswitchinterval(SWITCH_S)
    opened = open_buffer(run, config)
    listener = _listen(allowed_ports(config.buffer.port, ports))
    uvloop.run(_serve(run, opened, listener, interface))
    opened.close()


def _keep_freed_memory() -> None:
    """Have the C library use again what a request has freed, instead of giving it back.

    Else each body of some megabytes is given pages one by one, and cleared, several times over:
    on a virtual machine that took 3 ms of the processor for a group of 2.6 MB.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, 32 * 2**20)  # the most it accepts
        set_option(M_TRIM_THRESHOLD, KEPT_BYTES)


async def _serve(
    run: RunDir, opened: OpenBuffer, listener: socket.socket, interface: str | None
) -> None:
    writer = Writer(opened.store, opened.owner.check, exit_with_cause, full_mark=run.disk_full)
    writer.start()
    service = Service(
        opened.core,
        writer,
        run,
        token=auth.token(run),
        incarnation=opened.owner.incarnation,
        on_fatal=exit_with_cause,
    )
    loop = asyncio.get_running_loop()
    server = _Server(
        _uvicorn_config(run, service), lambda: loop.call_soon_threadsafe(service.drain)
    )
    port = listener.getsockname()[1]
    publish_endpoint(run, port, opened.owner.incarnation, interface)
    state = opened.core.book.state
    log.info(
        "incarnation %d listens on port %d; step %d is being filled, lineage %d.",
        opened.owner.incarnation, port, state.current_step, state.lineage,
    )  # fmt: skip
    over = asyncio.create_task(_stop_when_over(service, server))
    await server.serve(sockets=[listener])
    over.cancel()
    writer.stop()


async def _stop_when_over(service: Service, server: _Server) -> None:
    await service.is_over.wait()
    log.info("the run is complete and every actor was told.")
    service.drain()
    server.should_exit = True


def _uvicorn_config(run: RunDir, service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        service.app,
        ssl_certfile=str(run.auth / auth.CERTIFICATE),
        ssl_keyfile=str(run.auth / auth.KEY),
        http="h11",  # the other implementation reads headers without a bound, before any token
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_keep_alive=60,
        timeout_graceful_shutdown=DRAIN_S,
    )


class _Server(uvicorn.Server):
    """Tells the service to let its waiting requests go before uvicorn waits for them.

    uvicorn raises the captured signal again when it is done, for the handler that was set before;
    that handler must not end the process, so that it closes its files and exits with 0.
    """

    def __init__(self, config: uvicorn.Config, on_exit: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_exit = on_exit
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop_before_serving)
        # uvicorn itself does not know of it.
        signal.signal(signal.SIGUSR2, self.handle_exit)

    def _stop_before_serving(self, _: int, __: object) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        hurry = asyncio.create_task(self._drop_idle())
        await super().shutdown(sockets)
        hurry.cancel()

    async def _drop_idle(self) -> None:
        """A client that is idle does not read, so it never answers the end of TLS: do not wait."""
        while True:
            is_answered = not self.server_state.tasks
            await asyncio.sleep(FLUSH_S)
            if is_answered:
                for connection in list(self.server_state.connections):
                    connection.transport.abort()

    def handle_exit(self, sig: int, frame: object) -> None:
        self._on_exit()
        super().handle_exit(sig, frame)  # type: ignore[arg-type]  # frame: uvicorn's narrower type


def allowed_ports(port: int, ports: range | None) -> range:
    """Those to try: the run's own, or else any the cluster allows; 0 stands for any free one.

    Raises ValueError when the cluster does not allow the run's own.
    """
    if not port:
        return ports or range(1)
    if ports is not None and port not in ports:
        raise ValueError(
            f"buffer.port = {port} lies outside the ports of the cluster, {ports[0]} to "
            f"{ports[-1]} (network.port_range of the site file). Set buffer.port to 0."
        )
    return range(port, port + 1)


def _listen(ports: range) -> socket.socket:
    """A listening socket on every interface; a predecessor's port may be in use for a moment."""
    for port in ports:
        # Unless the protocol is named, asyncio leaves Nagle on: 40 ms for each answer.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            listener.bind(("0.0.0.0", port))
            listener.listen(BACKLOG)
            return listener
        listener.close()
    tried = f"port {ports[0]} (buffer.port) is" if len(ports) == 1 else f"ports {ports[0]} to "
    tried += "" if len(ports) == 1 else f"{ports[-1]} (network.port_range) are all"
    raise OSError(
        errno.EADDRINUSE,
        f"{tried} in use on {socket.gethostname()}; set buffer.port to 0 for any free port, or "
        "widen the range",
    )
