"""An actor without an engine: the real client, the real messages, made-up tokens."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dapo_hpc.buffer import messages as msg
from dapo_hpc.buffer.client import BufferClient
from dapo_hpc.records import Lease, PartialResponse, PolicyVersion, Response, VersionSpan
from dapo_hpc.run_dir import RunDir
from tests.campaign import draws
from tests.campaign.history import History

ROUND_S = 0.02
"""Between two rounds of sampling; each is followed by a heartbeat."""
ROUND_TOKENS = 32
"""New tokens of a response in a round; most responses take two."""
PLACES = 128
GIVE_UP_S = 300.0


@dataclass(slots=True)
class Growing:
    """One response on its way; its tokens are random, so that a second sampling shows."""

    lease: Lease
    part: PartialResponse
    tokens: list[int]
    spans: list[VersionSpan]
    reported: int
    """Tokens that the buffer has acknowledged."""
    goal: int

    @classmethod
    def begin(cls, lease: Lease, part: PartialResponse) -> Growing:
        known = [int(token) for token in part.token_ids]
        return cls(
            lease=lease,
            part=part,
            tokens=known,
            spans=list(part.spans),
            reported=len(known),
            goal=draws.num_tokens(lease.group_id, part.index),
        )

    def grow(self, draw: random.Random, version: PolicyVersion) -> None:
        count = min(ROUND_TOKENS, self.goal - len(self.tokens))
        if count > 0 and (not self.spans or self.spans[-1].version != version):
            self.spans.append(VersionSpan(start=len(self.tokens), version=version))
        self.tokens += [draw.getrandbits(31) for _ in range(count)]

    @property
    def is_done(self) -> bool:
        return len(self.tokens) >= self.goal

    def news(self) -> PartialResponse:
        """What the buffer does not know yet."""
        start = self.reported
        before = [s for s in self.spans if s.start <= start][-1:]
        spans = [VersionSpan(start=start, version=s.version) for s in before]
        spans += [s for s in self.spans if s.start > start]
        tokens = self.tokens[start:]
        return PartialResponse(
            index=self.part.index,
            token_ids=np.array(tokens, np.int32),
            rollout_logprobs=np.full(len(tokens), -0.5, np.float32),
            spans=tuple(spans) if tokens else (),
        )

    def finished(self) -> Response:
        is_correct = draws.is_correct(self.lease.group_id, self.part.index)
        return Response(
            index=self.part.index,
            token_ids=np.array(self.tokens, np.int32),
            rollout_logprobs=np.full(len(self.tokens), -0.5, np.float32),
            spans=tuple(self.spans),
            finish_reason="stop",
            is_correct=is_correct,
            reward=1.0 if is_correct else -1.0,
        )


@dataclass(slots=True)
class Sampler:
    """One life of one actor."""

    name: str
    client: BufferClient
    history: History
    draw: random.Random
    version: PolicyVersion | None = None
    work: list[Growing] = field(default_factory=list)

    def live(self) -> None:
        """Until the buffer says that the run is complete."""
        while not (len(self.work) < PLACES // 2 and self._lease()):
            if self.work:
                self._round()

    def _lease(self) -> bool:
        """Ask for as much as there is room for. True: the run is complete."""
        reply = self.client.lease(
            msg.LeaseRequest(
                actor=self.name,
                version=self.version,
                max_responses=PLACES - len(self.work),
                wait_s=0.0 if self.work else 1.0,
                stats=msg.ActorStats(),
            )
        )
        self._drop([*reply.abort])
        for lease in reply.leases:
            self.history.note("leased", lease=lease.lease_id, group=lease.group_id)
            self.work += [Growing.begin(lease, part) for part in lease.missing]
        if reply.newest is not None:
            self.version = reply.newest
        return reply.is_done

    def _round(self) -> None:
        assert self.version is not None, "work comes to actors that hold weights"
        for growing in self.work:
            growing.grow(self.draw, self.version)
        time.sleep(ROUND_S)
        done = [growing for growing in self.work if growing.is_done]
        self.work = [growing for growing in self.work if not growing.is_done]
        if self.work:
            self._report()
        if done:
            self._submit(done)

    def _report(self) -> None:
        by_lease: dict[int, list[Growing]] = {}
        for growing in self.work:
            by_lease.setdefault(growing.lease.lease_id, []).append(growing)
        request = msg.HeartbeatRequest(
            actor=self.name,
            version=self.version,
            leases=[
                msg.LeaseProgress(
                    lease_id=lease_id,
                    new_tokens=[growing.news() for growing in mine],
                    offsets=[growing.reported for growing in mine],
                )
                for lease_id, mine in by_lease.items()
            ],
            stats=msg.ActorStats(),
        )
        reply = self.client.heartbeat(request)
        self._drop([*reply.lost, *reply.abort])
        for growing in self.work:
            new = growing.tokens[growing.reported :]
            self.history.note(
                "reported",
                group=growing.lease.group_id,
                index=growing.part.index,
                lease=growing.lease.lease_id,
                offset=growing.reported,
                tokens=new,
                versions=[[s.version.step, s.version.lineage] for s in growing.spans],
            )
            growing.reported = len(growing.tokens)

    def _submit(self, done: list[Growing]) -> None:
        by_lease: dict[int, list[Response]] = {}
        for growing in done:
            by_lease.setdefault(growing.lease.lease_id, []).append(growing.finished())
        parts = [msg.LeaseResponses(lease_id=k, responses=v) for k, v in by_lease.items()]
        groups = {growing.lease.lease_id: growing.lease.group_id for growing in done}
        request = msg.SubmitRequest(actor=self.name, leases=parts, stats=msg.ActorStats())
        verdicts = self.client.submit(request).verdicts
        for part, given in zip(parts, verdicts, strict=True):
            for response, verdict in zip(part.responses, given, strict=True):
                self.history.note(
                    "submitted",
                    group=groups[part.lease_id],
                    index=response.index,
                    lease=part.lease_id,
                    verdict=verdict,
                    tokens=[int(token) for token in response.token_ids],
                )

    def _drop(self, lease_ids: list[int]) -> None:
        gone = set(lease_ids)
        self.work = [growing for growing in self.work if growing.lease.lease_id not in gone]


def main(root: Path, name: str, life: int, seed: int) -> None:
    """The whole process."""
    run = RunDir(root)
    client = BufferClient(run, request_timeout_s=2.0, give_up_s=GIVE_UP_S)
    history = History(root / "history" / f"{name}-{life}.jsonl")
    history.note("began", pid=os.getpid())
    Sampler(name, client, history, random.Random(f"{seed} {name} {life}")).live()
    history.note("ended")
