"""Actors that sample from a toy policy, speak the real messages, and die, hang and repeat calls.

The policy: the first token chooses between short and long; from then on each token ends the
response with a probability that depends on the first token alone. So what comes next depends only
on what is known, as in a language model, and a response that is begun again is a different one.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass, field

import numpy as np

from dapo_hpc.buffer import messages as msg
from dapo_hpc.records import Lease, PartialResponse, PolicyVersion, Response, VersionSpan
from dapo_hpc.rollout.work import merged, spans_between
from tests.chaos.history import Attempt, History
from tests.chaos.network import Client, Network
from tests.chaos.simulation import Life, Simulation, Steps

SHORT, LONG, END = 0, 1, 2
STATS = msg.ActorStats()


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The toy policy, and how fast an actor samples it."""

    mean_short: float = 12.0
    mean_long: float = 90.0
    """Mean tokens of a response that began with SHORT, with LONG."""
    tokens_per_s: float = 30.0
    max_tokens: int = 600
    correct_frac: float = 0.5

    def finish(self, known: np.ndarray, draw: random.Random) -> np.ndarray:
        """[n] int32: a whole response that begins with the known tokens."""
        if len(known) and (known[-1] == END or len(known) >= self.max_tokens):
            return known
        first = int(known[0]) if len(known) else draw.choice((SHORT, LONG))
        end_frac = 1 / (self.mean_long if first == LONG else self.mean_short)
        num_new = 1 + int(math.log(1.0 - draw.random()) / math.log(1.0 - end_frac))
        room = self.max_tokens - len(known)
        tokens = np.frombuffer(draw.randbytes(min(num_new, room)), np.uint8).astype(np.int32) + 3
        if num_new <= room:
            tokens[-1] = END
        whole = np.concatenate([known, tokens])
        if not len(known):
            whole = np.concatenate([np.array([first], np.int32), whole])[: self.max_tokens]
        return whole.astype(np.int32)


@dataclass(slots=True)
class Work:
    """One response being sampled."""

    attempt: Attempt
    spans: tuple[VersionSpan, ...]
    logprobs: np.ndarray
    began_s: float
    is_correct: bool

    def num_sampled(self, now: float, tokens_per_s: float) -> int:
        new = int((now - self.began_s) * tokens_per_s)
        return min(len(self.attempt.token_ids), len(self.attempt.known.token_ids) + new)


@dataclass(slots=True)
class Held:
    lease: Lease
    works: dict[int, Work]


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """Times in seconds; probabilities for each look at the buffer."""

    max_responses: int = 8
    poll_s: float = 0.8
    heartbeat_s: float = 1.0
    submit_s: float = 0.4
    drain: float = 0.0
    fail: float = 0.0


@dataclass(eq=False)
class SimActor:
    """One life of one actor process: three conversations with the buffer at once."""

    name: str
    sim: Simulation
    network: Network
    history: History
    policy: Policy
    habits: Habits
    life: Life = field(default_factory=Life)
    version: PolicyVersion | None = None
    leases: dict[int, Held] = field(default_factory=dict)

    def start(self) -> None:
        for steps in (self._lease(), self._beat(), self._submit()):
            self.sim.start(self.life, steps)

    def _lease(self) -> Steps:
        client = Client(self.network)
        while True:
            free = self.habits.max_responses - sum(len(h.works) for h in self.leases.values())
            asked = msg.LeaseRequest(
                actor=self.name,
                version=self.version,
                max_responses=max(0, free),
                wait_s=0.0,
                stats=STATS,
            )
            reply: msg.LeaseReply = yield from client.call("lease", asked, msg.LeaseReply)
            self._drop(reply.abort)
            for lease in reply.leases:
                self._take(lease, asked.version)
            self._load(reply.newest)
            if reply.is_done:
                self.life.is_dead = True
            yield self.habits.poll_s
            if self.sim.random.random() < self.habits.drain:
                yield from self._release(client, is_failure=False)
                self.life.is_dead = True
            elif self.sim.random.random() < self.habits.fail:
                yield from self._release(client, is_failure=True)

    def _take(self, lease: Lease, version: PolicyVersion | None) -> None:
        assert version is not None, "work comes to actors with weights"
        held = Held(
            lease, {part.index: self._begin(lease, part, version) for part in lease.missing}
        )
        self.leases[lease.lease_id] = held
        self.history.leased(lease, {index: work.attempt for index, work in held.works.items()})

    def _begin(self, lease: Lease, part: PartialResponse, version: PolicyVersion) -> Work:
        draw = self.sim.random
        tokens = self.policy.finish(part.token_ids, draw)
        num_known = len(part.token_ids)
        new = np.frombuffer(draw.randbytes(len(tokens) - num_known), np.uint8).astype(np.float32)
        attempt = Attempt(lease.lease_id, self.name, version, part, tokens, num_known, num_known)
        spans = merged((*part.spans, VersionSpan(start=num_known, version=version)))
        logprobs = np.concatenate([part.rollout_logprobs, -new]).astype(np.float32)
        is_correct = draw.random() < self.policy.correct_frac
        return Work(attempt, spans, logprobs, self.sim.now, is_correct)

    def _load(self, newest: PolicyVersion | None) -> None:
        """New weights, unless an evaluation still needs the old ones."""
        if newest is None or newest == self.version:
            return
        if any(held.lease.kind == "eval" for held in self.leases.values()):
            return
        self.version = newest
        for held in self.leases.values():
            for work in held.works.values():
                start = work.num_sampled(self.sim.now, self.policy.tokens_per_s)
                if start < len(work.attempt.token_ids):
                    work.spans = merged((*work.spans, VersionSpan(start=start, version=newest)))

    def _drop(self, lease_ids: list[int]) -> None:
        for lease_id in lease_ids:
            self.leases.pop(lease_id, None)

    # heartbeats

    def _beat(self) -> Steps:
        client = Client(self.network)
        while True:
            yield self.habits.heartbeat_s
            progress = self._progress()
            asked = msg.HeartbeatRequest(
                actor=self.name, version=self.version, leases=progress, stats=STATS
            )
            reply: msg.HeartbeatReply = yield from client.call(
                "heartbeat", asked, msg.HeartbeatReply
            )
            lost = {*reply.lost, *reply.abort}
            self._acknowledge([part for part in progress if part.lease_id not in lost])
            self._drop([*lost])

    def _progress(self) -> list[msg.LeaseProgress]:
        return [self._lease_progress(held) for held in self.leases.values()]

    def _lease_progress(self, held: Held) -> msg.LeaseProgress:
        parts, offsets = [], []
        for index, work in held.works.items():
            start = work.attempt.acked_tokens
            stop = work.num_sampled(self.sim.now, self.policy.tokens_per_s)
            if stop > start:
                parts.append(_piece(index, work, start, stop))
                offsets.append(start)
                work.attempt.sent_tokens = max(work.attempt.sent_tokens, stop)
        return msg.LeaseProgress(lease_id=held.lease.lease_id, new_tokens=parts, offsets=offsets)

    def _acknowledge(self, sent: list[msg.LeaseProgress]) -> None:
        for progress in sent:
            held = self.leases.get(progress.lease_id)
            for part, offset in zip(progress.new_tokens, progress.offsets, strict=True):
                work = held.works.get(part.index) if held else None
                if work is not None:
                    acked = max(work.attempt.acked_tokens, offset + len(part.token_ids))
                    work.attempt.acked_tokens = acked

    def _release(self, client: Client, *, is_failure: bool) -> Steps:
        asked = msg.ReleaseRequest(actor=self.name, leases=self._progress(), is_failure=is_failure)
        self.leases.clear()
        yield from client.call("release", asked)

    # finished responses

    def _submit(self) -> Steps:
        client = Client(self.network)
        while True:
            yield self.habits.submit_s
            finished = self._finished()
            if finished:
                sent = [self.leases[part.lease_id] for part in finished]
                asked = msg.SubmitRequest(actor=self.name, leases=finished, stats=STATS)
                reply = yield from client.call("submit", asked, msg.SubmitReply)
                for held, part, verdicts in zip(sent, finished, reply.verdicts, strict=True):
                    self._settle(held, part, verdicts)

    def _finished(self) -> list[msg.LeaseResponses]:
        found = []
        for lease_id, held in self.leases.items():
            responses = [
                self._response(index, work)
                for index, work in held.works.items()
                if work.num_sampled(self.sim.now, self.policy.tokens_per_s)
                == len(work.attempt.token_ids)
            ]
            if responses:
                found.append(msg.LeaseResponses(lease_id=lease_id, responses=responses))
        return found

    def _response(self, index: int, work: Work) -> Response:
        tokens = work.attempt.token_ids
        response = Response(
            index=index,
            token_ids=tokens,
            rollout_logprobs=work.logprobs,
            spans=spans_between(work.spans, 0, len(tokens)),
            finish_reason="stop" if tokens[-1] == END else "length",
            is_correct=work.is_correct,
            reward=1.0 if work.is_correct else -1.0,
        )
        work.attempt.sent_sha = hashlib.sha256(msg.encode(response)).hexdigest()
        return response

    def _settle(self, held: Held, part: msg.LeaseResponses, verdicts: list[msg.Verdict]) -> None:
        """The lease may have been dropped while the submit was under way."""
        for response, verdict in zip(part.responses, verdicts, strict=True):
            attempt = held.works.pop(response.index).attempt
            attempt.is_acked = verdict == "stored"
        if not held.works:
            self.leases.pop(part.lease_id, None)


def _piece(index: int, work: Work, start: int, stop: int) -> PartialResponse:
    return PartialResponse(
        index=index,
        token_ids=work.attempt.token_ids[start:stop],
        rollout_logprobs=work.logprobs[start:stop],
        spans=spans_between(work.spans, start, stop),
    )
