"""The actor: lease, sample, score, submit, and load each new policy version.

The engine runs in the calling thread. Leasing, heartbeats, scoring and submitting run beside it, so
that nothing but a weight load keeps the engine waiting while it has work.
"""

from __future__ import annotations

import logging
import math
import queue
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dapo_hpc.buffer.client import BufferUnreachable
from dapo_hpc.buffer.messages import (
    ActorStats,
    HeartbeatRequest,
    LeaseRequest,
    LeaseResponses,
    ReleaseRequest,
    SubmitRequest,
)
from dapo_hpc.config import RunConfig
from dapo_hpc.records import FinishReason, PolicyVersion, Response
from dapo_hpc.reward.overlong import shaped_reward
from dapo_hpc.reward.pool import ScoringPool, Verdict
from dapo_hpc.rollout.contact import LONG_POLL_S, Buffer, Contact, Mail, News
from dapo_hpc.rollout.engine import Engine, EngineFailed, Sampled, Sampling, derived_seed
from dapo_hpc.rollout.probes import ProbeMismatch, check_probes
from dapo_hpc.rollout.sender import Sender
from dapo_hpc.rollout.work import LeaseTable, Work
from dapo_hpc.weights.fetch import fetch
from dapo_hpc.weights.manifest import WeightMismatch

IDLE_WAIT_S = 1.0
FLUSH_S = 2.0
"""A drain waits this long for verdicts and submits under way; the rest is handed back."""

_log = logging.getLogger(__name__)


class ActorLoop:
    """One life of one actor. `run` returns when the run is done or the actor is drained."""

    def __init__(
        self,
        *,
        name: str,
        config: RunConfig,
        weights_dir: Path,
        engine: Engine,
        tokenizer: Any,
        buffer: Buffer,
        idle_exit_s: float | None = None,
    ) -> None:
        """`idle_exit_s`: `run` returns after so long without a lease; None: it waits."""
        self._name, self._config, self._weights_dir = name, config, weights_dir
        self._engine, self._tokenizer, self._buffer = engine, tokenizer, buffer
        self._table = LeaseTable()
        self._mail: Mail = queue.SimpleQueue()
        self._contact = Contact(
            buffer,
            self._mail,
            lease_request=self._lease_request,
            heartbeat_request=self._heartbeat_request,
            acknowledge=lambda request: self._table.acknowledge(request.leases),
            heartbeat_s=config.buffer.heartbeat_s,
        )
        self._sender = Sender(self._submit, on_failure=self._mail.put)
        self._pool = ScoringPool(config.reward, self._on_scored)
        self._held: PolicyVersion | None = None
        self._newest: PolicyVersion | None = None
        self._missing: PolicyVersion | None = None
        self._is_done = self._is_draining = False
        self._idle_exit_s = math.inf if idle_exit_s is None else idle_exit_s
        self._worked_s = math.inf
        """When a lease was held last; time.monotonic()."""
        self.is_idle = False
        """There was no lease for idle_exit_s."""
        self._busy_s = self._idle_s = self._probe_mean_diff = 0.0
        self._num_finished = 0

    def drain(self) -> None:
        """Stop soon and hand unfinished work back. Safe in a signal handler."""
        self._is_draining = True
        self._mail.put(None)

    def run(self) -> None:
        """Sample until the run is done, the actor is drained, or it was idle for too long.

        Raises:
            EngineFailed: the leases are handed back as failures; start the process anew.
            WeightMismatch, ProbeMismatch: the weights are not the learner's; a person must look.
            BufferUnreachable: the buffer stayed away.
        """
        self._contact.start()
        self._worked_s = time.monotonic()
        try:
            while not (self._is_draining or self._is_done or self.is_idle):
                self._turn()
            self._hand_back()
        except EngineFailed:
            self._release(None, is_failure=True)
            raise
        except (WeightMismatch, ProbeMismatch) as error:
            self._release(None, with_tokens=isinstance(error, WeightMismatch))
            raise
        finally:
            self._sender.close()
            self._pool.close()

    def _turn(self) -> None:
        """Work in the news, then one engine step if there is anything to sample."""
        started_s = time.monotonic()
        is_busy = self._engine.has_work
        self._read_mail(wait_s=0.0 if is_busy else IDLE_WAIT_S)
        if self._is_load_due():
            self._load()
        self._start_waiting()
        if len(self._table):
            self._worked_s = started_s
        self.is_idle = started_s - self._worked_s > self._idle_exit_s
        for sampled in self._engine.step():
            self._on_sampled(sampled)
        if self._pool.failure is not None:
            raise RuntimeError(self._pool.failure)
        elapsed_s = time.monotonic() - started_s
        self._busy_s += elapsed_s * is_busy
        self._idle_s += elapsed_s * (not is_busy)

    # ---- news -----------------------------------------------------------------------------

    def _read_mail(self, wait_s: float) -> None:
        """Work in all mail that is there; waits up to `wait_s` for the first."""
        while True:
            try:
                mail = self._mail.get(block=wait_s > 0, timeout=wait_s)
            except queue.Empty:
                return
            wait_s = 0.0
            if isinstance(mail, BaseException):
                raise mail
            if mail is not None:
                self._work_in(mail)

    def _work_in(self, news: News) -> None:
        self._engine.abort(self._table.drop(news.dropped))
        for lease in news.leases:
            self._table.take(lease)
        self._newest = news.newest or self._newest
        self._is_done = self._is_done or news.is_done
        if news.is_lease_reply and not self._is_load_due():
            self._contact.settle()

    # ---- weights --------------------------------------------------------------------------

    def _is_load_due(self) -> bool:
        """A newer version is there and nothing must finish on the one held."""
        if self._newest == self._held or self._table.is_pinned(self._held):
            return False
        return not (self._is_synchronous and self._engine.has_work)

    @property
    def _is_synchronous(self) -> bool:
        return self._config.buffer.max_staleness == 0

    def _load(self) -> None:
        """Fetch the newest version, load it, prove it; then lease again."""
        version = self._newest
        assert version is not None, "a load is due only when a version is published"
        started_s = time.monotonic()
        try:
            directory, manifest = fetch(self._weights_dir, version)
        except FileNotFoundError:
            if version == self._missing:
                raise
            self._ask_again(version)
            return
        self._engine.load(directory)
        self._table.switch(version, self._engine.num_tokens)
        self._held = version
        tolerance = self._config.weights.probe_tolerance
        self._probe_mean_diff = check_probes(self._engine, manifest, tolerance=tolerance)
        self._contact.settle()
        _log.info(
            "weights %s loaded in %.2f s; %.2g nats from the learner.",
            version.name,
            time.monotonic() - started_s,
            self._probe_mean_diff,
        )

    def _ask_again(self, version: PolicyVersion) -> None:
        """A version may be retired while a slow actor still wants it: the buffer knows a newer."""
        self._missing, self._newest = version, self._held
        self._contact.settle()

    # ---- sampling -------------------------------------------------------------------------

    def _start_waiting(self) -> None:
        """Give waiting responses to the engine as far as it holds the weights they need."""
        for work in self._table.waiting():
            if self._table.find(work.request_id) is None:
                continue  # its lease was given up a moment ago
            pinned = work.lease.version
            if self._may_sample(pinned):
                self._start(work)
            elif pinned not in (None, self._newest):
                self._give_up(work.lease.lease_id)

    def _may_sample(self, pinned: PolicyVersion | None) -> bool:
        if self._held is None or pinned is not None:
            return self._held is not None and pinned == self._held
        return self._held == self._newest or not self._is_synchronous

    def _start(self, work: Work) -> None:
        assert self._held is not None, "responses start only after the first load"
        self._table.start(work, self._held)
        reason = self._known_end(work)
        if reason is not None:
            self._on_sampled(_nothing_more(work, reason))
            return
        token_ids = np.concatenate([work.lease.prompt.token_ids, work.prefix.token_ids])
        try:
            self._engine.add(work.request_id, token_ids.tolist(), self._sampling(work))
        except ValueError as error:
            _log.error("%s The lease is handed back.", error)
            self._give_up(work.lease.lease_id, is_failure=True)

    def _known_end(self, work: Work) -> FinishReason | None:
        """How a response ended whose every token an earlier actor sampled; None: it goes on."""
        if work.num_prefix and int(work.prefix.token_ids[-1]) in self._engine.end_tokens:
            return "stop"
        is_full = work.num_prefix >= self._config.rollout.max_response_tokens
        return "length" if is_full else None

    def _sampling(self, work: Work) -> Sampling:
        config, lease, index = self._config, work.lease, work.prefix.index
        is_train = lease.kind == "train"
        seed = (config.run.seed, lease.prompt.uid, index, lease.attempt, work.num_prefix)
        return Sampling(
            max_tokens=config.rollout.max_response_tokens - work.num_prefix,
            temperature=config.rollout.temperature if is_train else config.eval.temperature,
            top_p=1.0 if is_train else config.eval.top_p,
            seed=derived_seed(*seed) if config.run.deterministic else None,
        )

    # ---- finished responses ---------------------------------------------------------------

    def _on_sampled(self, sampled: Sampled) -> None:
        work = self._table.find(sampled.request_id)
        if work is None:
            return
        if sampled.finish_reason is None:
            _log.error("the engine gave up request %s; handed back.", sampled.request_id)
            self._give_up(work.lease.lease_id, is_failure=True)
            return
        work.ended = sampled
        self._num_finished += 1
        text = self._tokenizer.decode(work.token_ids().tolist(), skip_special_tokens=True)
        self._pool.submit(work.request_id, text, work.lease.prompt.ground_truth)

    def _on_scored(self, request_id: str, verdict: Verdict) -> None:
        """In the pool's thread."""
        work = self._table.find(request_id)
        if work is not None:
            response = self._response(work, verdict)
            self._sender.add(work.lease.lease_id, response, is_last=self._table.score(work))

    def _response(self, work: Work, verdict: Verdict) -> Response:
        assert work.ended is not None, "only an ended response is scored"
        assert work.ended.finish_reason is not None, "a given-up response is not scored"
        token_ids = work.token_ids()
        return Response(
            index=work.prefix.index,
            token_ids=token_ids,
            rollout_logprobs=work.rollout_logprobs(),
            spans=work.response_spans(),
            finish_reason=work.ended.finish_reason,
            is_correct=verdict.is_correct,
            reward=shaped_reward(
                verdict.is_correct,
                len(token_ids),
                self._config.reward,
                max_response_tokens=self._config.rollout.max_response_tokens,
            ),
            is_verifier_timeout=verdict.is_timeout,
        )

    def _submit(self, finished: list[LeaseResponses]) -> None:
        """In the sender's thread."""
        reply = self._buffer.submit(
            SubmitRequest(actor=self._name, leases=finished, stats=self._stats())
        )
        for part, verdicts in zip(finished, reply.verdicts, strict=True):
            self._table.finish(part.lease_id, [response.index for response in part.responses])
            if "fenced" in verdicts:
                self._mail.put(News(dropped=(part.lease_id,)))

    # ---- handing back ---------------------------------------------------------------------

    def _give_up(self, lease_id: int, *, is_failure: bool = False) -> None:
        self._engine.abort(self._release({lease_id}, is_failure=is_failure))

    def _release(
        self, lease_ids: set[int] | None, *, is_failure: bool = False, with_tokens: bool = True
    ) -> list[str]:
        """Hand leases (None: all) back; returns their request ids."""
        leases = self._table.progress(self._engine.partial, lease_ids)
        if not with_tokens:
            leases = [replace(lease, new_tokens=[], offsets=[]) for lease in leases]
        request = ReleaseRequest(
            actor=self._name, leases=leases, is_failure=is_failure, stats=self._stats()
        )
        dropped = self._table.drop(lease_ids)
        if leases:
            try:
                self._buffer.release(request)
            except BufferUnreachable as error:
                _log.warning("%s The leases will expire instead.", error)
        return dropped

    def _hand_back(self) -> None:
        """End the conversation; deliver what is finished, hand back the rest."""
        self._contact.stop()
        deadline_s = time.monotonic() + FLUSH_S
        while self._table.num_unstored() and time.monotonic() < deadline_s:
            time.sleep(0.02)
        self._read_mail(wait_s=0.0)
        num_leases = len(self._table)
        self._release(None)
        cause = "the run is done" if self._is_done else "drained"
        if self.is_idle:
            cause = f"no work for {self._idle_exit_s:.0f} s"
        _log.info("%s; %d unfinished leases handed back.", cause, num_leases)

    # ---- what the buffer is told ----------------------------------------------------------

    def _lease_request(self) -> LeaseRequest:
        rollout = self._config.rollout
        places = max(0, rollout.max_sequences - self._table.num_unsampled())
        if self._is_synchronous and self._held != self._newest:
            places = 0
        return LeaseRequest(
            actor=self._name,
            version=self._held,
            max_responses=places,
            wait_s=LONG_POLL_S if places >= rollout.group_size else 0.0,
            stats=self._stats(),
        )

    def _heartbeat_request(self) -> HeartbeatRequest:
        return HeartbeatRequest(
            actor=self._name,
            version=self._held,
            leases=self._table.progress(self._engine.partial),
            stats=self._stats(),
        )

    def _stats(self) -> ActorStats:
        return ActorStats(
            generated_tokens=self._engine.num_sampled_tokens,
            finished_responses=self._num_finished,
            busy_s=self._busy_s,
            idle_s=self._idle_s,
            cpu_s=time.process_time() + self._pool.cpu_s,
            peak_memory_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            verifier_timeouts=self._pool.num_timeouts,
            probe_mean_diff=self._probe_mean_diff,
        )


def _nothing_more(work: Work, reason: FinishReason) -> Sampled:
    """What the engine would return for a response that has already ended."""
    return Sampled(
        request_id=work.request_id,
        token_ids=np.zeros(0, dtype=np.int32),
        logprobs=np.zeros(0, dtype=np.float32),
        finish_reason=reason,
    )
