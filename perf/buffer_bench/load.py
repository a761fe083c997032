"""Processes that load the buffer. Each returns how long every call took."""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from dapo_hpc.buffer import messages as msg
from dapo_hpc.records import Lease, PartialResponse, PolicyVersion, Response, VersionSpan
from dapo_hpc.run_dir import RunDir

from .wire import Wire

UPLOADS = 4
"""Connections that upload whole groups, one after another."""
TOKENS = 20_480
"""Of a response: the published limit."""
BEAT_S = 3.0
"""Between two heartbeats of an actor."""
BEAT_TOKENS = 90
"""New tokens of each response in a heartbeat: 30 a second."""
WAIT_S = 1.0

Timings = dict[str, list[tuple[float, float]]]
"""Call -> (second of its answer, how long it took), on time.monotonic()."""


def in_process(work: Callable[..., Awaitable[Timings]], pipe: Any, *words: Any) -> None:
    """The body of a process: run a coroutine, send what it found."""
    pipe.send(asyncio.run(work(*words)))


async def upload(root: Path, seconds: float) -> Timings:
    """UPLOADS actors that sample nothing and submit full groups as fast as they are answered."""
    found: Timings = defaultdict(list)
    until = time.monotonic() + seconds
    tokens = np.random.default_rng(0).integers(0, 150_000, TOKENS, dtype=np.int32)
    logprobs = np.full(TOKENS, -0.5, np.float32)
    await asyncio.gather(
        *(
            _upload(RunDir(root), f"upload-{i}", until, found, tokens, logprobs)
            for i in range(UPLOADS)
        )
    )
    return dict(found)


async def _upload(
    run: RunDir,
    name: str,
    until: float,
    found: Timings,
    tokens: np.ndarray,
    logprobs: np.ndarray,
) -> None:
    wire = await Wire.open(run)
    version: PolicyVersion | None = None
    while time.monotonic() < until:
        request = msg.LeaseRequest(
            actor=name,
            version=version,
            max_responses=1 << 10,
            wait_s=WAIT_S,
            stats=msg.ActorStats(),
        )
        asked = time.monotonic()
        reply = await wire.call("lease", request, msg.LeaseReply)
        if reply.leases:
            _note(found, "lease", asked)
        for lease in reply.leases:
            assert version is not None
            body = msg.encode(_submission(name, lease, version, tokens, logprobs))
            asked = time.monotonic()
            await wire.post("submit", body)
            _note(found, "submit", asked)
        version = reply.newest or version
    wire.close()


def _submission(
    name: str, lease: Lease, version: PolicyVersion, tokens: np.ndarray, logprobs: np.ndarray
) -> msg.SubmitRequest:
    """All responses of a lease, half of them right."""
    spans = (VersionSpan(start=0, version=version),)
    responses = [
        Response(
            index=part.index,
            token_ids=tokens,
            rollout_logprobs=logprobs,
            spans=spans,
            finish_reason="length",
            is_correct=part.index % 2 == 0,
            reward=1.0 if part.index % 2 == 0 else -1.0,
        )
        for part in lease.missing
    ]
    finished = msg.LeaseResponses(lease_id=lease.lease_id, responses=responses)
    return msg.SubmitRequest(actor=name, leases=[finished], stats=msg.ActorStats())


async def upload_plain(root: Path, port: int, num_bytes: int, seconds: float) -> Timings:
    """The same bytes to a server that only reads them."""
    found: Timings = defaultdict(list)
    until = time.monotonic() + seconds
    body = np.random.default_rng(0).bytes(num_bytes)

    async def one() -> None:
        wire = await Wire.open(RunDir(root), port)
        while time.monotonic() < until:
            asked = time.monotonic()
            await wire.post("submit", body)
            _note(found, "submit", asked)
        wire.close()

    await asyncio.gather(*(one() for _ in range(UPLOADS)))
    return dict(found)


async def beat(root: Path, num_actors: int, is_ready: Any, is_over: Any) -> Timings:
    """Actors that hold one lease each and report its new tokens every BEAT_S."""
    found: Timings = defaultdict(list)
    draw = random.Random(0)
    room = asyncio.Semaphore(16)
    actors = [_Beater(RunDir(root), f"beat-{i}") for i in range(num_actors)]
    await asyncio.gather(*(actor.begin(room) for actor in actors))
    is_ready.set()
    beats = [actor.beat(draw.uniform(0, BEAT_S), found, is_over) for actor in actors]
    await asyncio.gather(*beats)
    return dict(found)


class _Beater:
    def __init__(self, run: RunDir, name: str) -> None:
        self._run, self._name = run, name
        self._known = 0

    async def begin(self, room: asyncio.Semaphore) -> None:
        """Connect, learn the version, get a lease."""
        async with room:
            self._wire = await Wire.open(self._run)
            leases: list[Lease] = []
            self._version: PolicyVersion | None = None
            while not leases:
                request = msg.LeaseRequest(
                    actor=self._name,
                    version=self._version,
                    max_responses=16,
                    wait_s=WAIT_S,
                    stats=msg.ActorStats(),
                )
                reply = await self._wire.call("lease", request, msg.LeaseReply)
                leases, self._version = reply.leases, reply.newest
            (self._lease,) = leases

    async def beat(self, first_s: float, found: Timings, is_over: Any) -> None:
        due = time.monotonic() + first_s
        while not is_over.is_set():
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due += BEAT_S
            body = msg.encode(self._request())
            asked = time.monotonic()
            await self._wire.post("heartbeat", body)
            _note(found, "heartbeat", asked)
            self._known += BEAT_TOKENS
        self._wire.close()

    def _request(self) -> msg.HeartbeatRequest:
        assert self._version is not None
        spans = (VersionSpan(start=self._known, version=self._version),)
        pieces = [
            PartialResponse(
                index=part.index,
                token_ids=np.arange(BEAT_TOKENS, dtype=np.int32),
                rollout_logprobs=np.full(BEAT_TOKENS, -0.5, np.float32),
                spans=spans,
            )
            for part in self._lease.missing
        ]
        progress = msg.LeaseProgress(
            lease_id=self._lease.lease_id,
            new_tokens=pieces,
            offsets=[self._known] * len(pieces),
        )
        return msg.HeartbeatRequest(
            actor=self._name, version=self._version, leases=[progress], stats=msg.ActorStats()
        )


def _note(found: Timings, call: str, asked: float) -> None:
    now = time.monotonic()
    found[call].append((now, now - asked))
