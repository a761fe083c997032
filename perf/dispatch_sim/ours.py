"""Our policy: the buffer's own core on a virtual clock, with actors that do what real ones do.

A real actor asks again within 0.1 s of what it waits for; here it asks at once, and requests take
no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, overload

import numpy as np

from dapo_hpc.buffer import messages as msg
from dapo_hpc.buffer.core import BufferSettings, Core, Prompts
from dapo_hpc.records import Lease, PolicyVersion, Prompt, Response, VersionSpan

from .engines import Engine, Engines
from .record import Step
from .workload import MAX_TOKENS, NUM_ROWS, Draw, Workload

HEARTBEAT_S = 30.0
LEASE_S = 120.0
STATS = msg.ActorStats()
_TOKENS = np.zeros(MAX_TOKENS + 1, dtype=np.int32)
_LOGPROBS = np.zeros(MAX_TOKENS + 1, dtype=np.float32)


class Rows(Sequence[Prompt]):
    """As many prompts as rows, made when asked for."""

    def __len__(self) -> int:
        return NUM_ROWS

    @overload
    def __getitem__(self, row: int) -> Prompt: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, row: int | slice) -> Prompt | Sequence[Prompt]:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        return Prompt(
            uid=str(row), row=row, token_ids=_TOKENS[:1], data_source="sim", ground_truth=""
        )


class Fleet:
    """A core and its actors. `fill` is one rollout step."""

    def __init__(
        self, workload: Workload, engines: Engines, num_groups: int, **changes: Any
    ) -> None:
        self.workload, self.engines = workload, engines
        settings = BufferSettings(
            total_steps=1_000_000,
            prompts_per_step=num_groups,
            group_size=workload.group_size,
            dynamic_sampling=True,
            max_staleness=0,
            lease_s=LEASE_S,
            max_attempts=3,
            on_exhausted="next_pass",
            eval_samples=1,
        )
        self.core = Core(
            replace(settings, **changes),
            Prompts(Rows(), [], workload.order),
            lambda _: b"",
            now=0.0,
        )
        self._index = {engine.name: i for i, engine in enumerate(engines.all)}
        self._draws: dict[int, Draw] = {}
        """By group."""
        self._attempts: dict[int, int] = {}
        """Times a row was dispatched, of rows that came back."""
        self._beat_s = HEARTBEAT_S
        self._seen = -1
        self._version: PolicyVersion | None = None
        self.num_calls = 0
        self.core.register(msg.RegisterRequest(step=0), 0.0)
        for engine in engines.all:
            self._ask(engine)

    def fill(self, step: int) -> Step:
        """Publish the weights of `step` - 1, sample until the batch of `step` closes, commit."""
        state = self.core.book.state
        version = PolicyVersion(step=step - 1, lineage=state.lineage)
        self.core.publish(msg.PublishRequest(version=version, is_evaluated=False), self.engines.now)
        self._version = version
        self._draws = {}
        for engine in self.engines.all:
            self._ask(engine)
        taken = self._take(step)
        while taken.groups is None:
            self._advance()
            if self._is_news():
                taken = self._take(step)
                self._tell()
        used = [self._draws[group.group_id] for group in taken.groups]
        dispatched = list(self._draws.values())
        self.core.commit(msg.CommitRequest(lineage=state.lineage, step=step), self.engines.now)
        return replace(
            Step.of(used, dispatched),
            tail_wait_s=taken.metrics.get("buffer/tail_wait_s", 0.0),
            predicted=taken.metrics.get("buffer/kept_frac_predicted", 0.0),
            accepted=taken.metrics["buffer/kept_frac"],
        )

    def _take(self, step: int) -> msg.TakeReply:
        self.num_calls += 1
        request = msg.TakeRequest(lineage=self.core.book.state.lineage, step=step, wait_s=0.0)
        reply = self.core.take(request, self.engines.now)
        self.core.take_effects()
        return reply

    def _advance(self) -> None:
        """The next thing that happens: a heartbeat of everybody, or the end of a response."""
        if self._beat_s <= self.engines.next_s():
            self.engines.now = max(self.engines.now, self._beat_s)
            self._beat_s += HEARTBEAT_S
            for engine in self.engines.all:
                self._heartbeat(engine)
            return
        index, ended = self.engines.pop()
        engine = self.engines.all[index]
        lease_id, group_id, part = ended  # type: ignore[misc]
        self._submit(engine, lease_id, self._response(group_id, part))
        if engine.free >= self.workload.group_size:
            self._ask(engine)

    def _is_news(self) -> bool:
        """What a request that waits would be woken by."""
        is_news = self.core.book.wakeups != self._seen
        self._seen = self.core.book.wakeups
        return is_news

    def _tell(self) -> None:
        """All who have room ask again, and whoever works in vain hears of it."""
        views = self.core.desk.fleet.views
        for engine in self.engines.all:
            has_room = engine.free >= self.workload.group_size
            if has_room or views[engine.name].untold_aborts:
                self._ask(engine)

    def _ask(self, engine: Engine) -> None:
        """Ask until there is nothing more to get, as an actor does."""
        self.num_calls += 1
        now = self.engines.now
        request = msg.LeaseRequest(
            actor=engine.name,
            version=self._version,
            max_responses=engine.free,
            wait_s=0.0,
            stats=STATS,
        )
        reply = self.core.lease(request, now, f"call-{self.num_calls}")
        self.core.take_effects()
        if reply.abort:
            gone = set(reply.abort)
            engine.drop(lambda response: response[0] in gone, now)  # type: ignore[index]
        for lease in reply.leases:
            self._start(engine, lease)
        if reply.abort or reply.leases:
            self.engines.changed(self._index[engine.name])
        if reply.leases or reply.abort:
            self._ask(engine)

    def _start(self, engine: Engine, lease: Lease) -> None:
        row = lease.prompt.row
        draw = self._draws.get(lease.group_id)
        if draw is None:
            attempt = self._attempts.get(row, 0)
            self._attempts[row] = attempt + 1
            draw = self._draws[lease.group_id] = self.workload.draw(row, attempt)
        for part in lease.missing:
            response = (lease.lease_id, lease.group_id, part.index)
            engine.start(response, draw.lengths[part.index], self.engines.now)

    def _response(self, group_id: int, index: int) -> Response:
        draw = self._draws[group_id]
        assert self._version is not None, "nothing is sampled before weights are published"
        return Response(
            index=index,
            token_ids=_TOKENS[: draw.lengths[index]],
            rollout_logprobs=_LOGPROBS[: draw.lengths[index]],
            spans=(VersionSpan(start=0, version=self._version),),
            finish_reason="length" if draw.lengths[index] == MAX_TOKENS else "stop",
            is_correct=draw.is_correct[index],
            reward=1.0 if draw.is_correct[index] else -1.0,
        )

    def _submit(self, engine: Engine, lease_id: int, response: Response) -> None:
        self.num_calls += 1
        finished = msg.LeaseResponses(lease_id=lease_id, responses=[response])
        request = msg.SubmitRequest(actor=engine.name, leases=[finished], stats=STATS)
        self.core.submit(request, self.engines.now)
        self.core.take_effects()

    def _heartbeat(self, engine: Engine) -> None:
        """Without the tokens, which nobody here will have to go on from."""
        self.num_calls += 1
        lease_ids = sorted({response[0] for _, _, response in engine.active})  # type: ignore[index]
        leases = [msg.LeaseProgress(lease_id=i, new_tokens=[], offsets=[]) for i in lease_ids]
        request = msg.HeartbeatRequest(
            actor=engine.name, version=self._version, leases=leases, stats=STATS
        )
        reply = self.core.heartbeat(request, self.engines.now)
        self.core.take_effects()
        gone = {*reply.abort, *reply.lost}
        if gone:
            engine.drop(lambda response: response[0] in gone, self.engines.now)  # type: ignore[index]
            self.engines.changed(self._index[engine.name])
