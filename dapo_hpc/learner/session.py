"""The learner of this rank: its model, and the verbs a rollout step is written in.

Rank 0 alone talks to the buffer and writes metrics; what the others must know it announces. Every
verb is called by every rank, in the same order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from dapo_hpc.buffer.messages import EvaluationsReply, TakeReply, decode, encode
from dapo_hpc.config import RunConfig
from dapo_hpc.learner.checkpoint import Checkpoints, Progress
from dapo_hpc.learner.model import Policy
from dapo_hpc.learner.optimizer import AdamSettings, Optimizer
from dapo_hpc.learner.parallel import Processes
from dapo_hpc.learner.probe import probes
from dapo_hpc.learner.reference import Reference
from dapo_hpc.learner.start import load_start
from dapo_hpc.observe.final import refusals_are_final
from dapo_hpc.observe.metrics import MetricsLog
from dapo_hpc.records import Group, GroupSummary, PolicyVersion
from dapo_hpc.run_dir import RunDir, write_json
from dapo_hpc.weights import publish

LEAVE = b"leave"
POLL_S = 2.0
"""How long the buffer may hold a request for a batch; between two, evaluations are written down."""

log = logging.getLogger(__name__)


class AskedToLeave(Exception):
    """Between two steps, on every rank: put what is trained away, and exit 0."""


class Buffer(Protocol):
    """What the learner asks of the buffer; see dapo_hpc.buffer.client.BufferClient."""

    def register(self, step: int) -> int: ...
    def take(self, lineage: int, step: int, wait_s: float) -> TakeReply: ...
    def fetch(self, group_ids: list[int]) -> list[Group]: ...
    def publish(self, version: PolicyVersion, *, is_evaluated: bool) -> None: ...
    def commit(self, lineage: int, step: int) -> None: ...
    def evaluations(self) -> EvaluationsReply: ...
    def finish(self, lineage: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Taken:
    """A closed batch, as every rank knows it."""

    groups: list[GroupSummary]
    metrics: dict[str, float]


@dataclass(slots=True)
class Session:
    """One life of the learner: from registration with the buffer to its end."""

    run: RunDir
    config: RunConfig
    processes: Processes
    buffer: Buffer
    policy: Policy
    optimizer: Optimizer
    reference: Reference | None
    checkpoints: Checkpoints
    is_asked_to_leave: Callable[[], bool] = lambda: False
    """Looked at by rank 0 alone, between two steps and while it waits."""
    lineage: int = 0
    _committed: list[int] = field(default_factory=list, repr=False)
    """Steps with a checkpoint at the last commit."""
    _metrics: MetricsLog | None = field(default=None, repr=False)

    def resume(self) -> int:
        """Load the newest checkpoint if there is one, and register; the steps trained so far."""
        progress = self.checkpoints.load_newest(self.policy, self.optimizer)
        step = progress.step if progress else 0
        if self.processes.rank == 0:
            self.lineage = self.buffer.register(step)
            self._metrics = MetricsLog(self.run.metrics, lineage=self.lineage)
            self.processes.announce(encode(self.lineage))
        else:
            self.lineage = decode(self.processes.listen(), int)
        log.info("lineage %d starts after step %d.", self.lineage, step)
        return step

    def take(self, step: int) -> Taken:
        """The batch of `step`, on every rank; waits as long as it takes.

        Raises AskedToLeave, on every rank, instead of waiting on.
        """
        if self.processes.rank != 0:
            taken: Taken = decode(self.hear(), Taken)
            return taken
        while True:
            self.processes.check_peers()
            self.leave_if_asked()
            self.record_evaluations()
            self.release_batches()
            reply = self.buffer.take(self.lineage, step, POLL_S)
            if reply.groups is not None:
                taken = Taken(reply.groups, reply.metrics)
                self.processes.announce(encode(taken))
                return taken

    def hear(self) -> bytes:
        """Other ranks: rank 0's next message. Raises AskedToLeave when it is that."""
        message = self.processes.listen()
        if message == LEAVE:
            raise AskedToLeave
        return message

    def leave_if_asked(self) -> None:
        """Rank 0: raise AskedToLeave here and on every rank that hears."""
        if self.is_asked_to_leave():
            self.processes.announce(LEAVE)
            raise AskedToLeave

    def checkpoint_before_leaving(self, step: int) -> None:
        """Save the policy of `step` unless that is done. The buffer may be gone by then."""
        self.checkpoints.ensure(
            self.policy, self.optimizer, Progress(step=step, lineage=self.lineage)
        )
        # Through rank 0 the others learn that it is durable: it may not be gone before.
        self.processes.barrier()

    def fetch(self, group_ids: list[int]) -> list[Group]:
        """Groups with their tokens, verified."""
        return self.buffer.fetch(group_ids)

    def publish(self, step: int) -> None:
        """Write the weights of `step` for the actors, and tell the buffer."""
        version = PolicyVersion(step=step, lineage=self.lineage)
        measured = probes(self.policy)
        tensors = self.policy.export()
        if self.processes.rank != 0:
            for _ in tensors:
                pass
            return
        weights = self.config.weights
        publish.publish(
            self.run.weights,
            version,
            tensors,
            measured,
            Path(self.config.model.path),
            weights.save_shard_bytes,
        )
        known = self.buffer.evaluations()
        is_evaluated = self._evaluation_is_due(step, known)
        self.buffer.publish(version, is_evaluated=is_evaluated)
        in_use = {used.name for used in known.versions_in_use}
        publish.retire(self.run.weights, weights.keep_versions, in_use)

    def checkpoint(self, step: int) -> bool:
        """Save when `step` is due, and let the buffer forget what no checkpoint needs."""
        progress = Progress(step=step, lineage=self.lineage)
        is_saved = self.checkpoints.save_when_due(
            self.policy,
            self.optimizer,
            progress,
            every=self.config.learner.checkpoint_every,
            last=self.config.run.total_steps,
        )
        self.release_batches()
        return is_saved

    def release_batches(self) -> None:
        """Tell the buffer, when it changes, which batches no durable checkpoint needs any more."""
        self.checkpoints.check()
        steps = self.checkpoints.steps()
        if self.processes.rank == 0 and steps not in ([], self._committed):
            self.buffer.commit(self.lineage, steps[0])
            self._committed = steps

    def record(self, step: int, figures: dict[str, float]) -> None:
        """Append the step's row. A second row of the same step takes the place of the first."""
        if self._metrics is not None:
            self._metrics.write("step", step, figures)

    def record_evaluations(self) -> int:
        """Write down finished evaluations that are not yet; the number still under way."""
        reply = self.buffer.evaluations()
        for result in reply.results:
            path = self.run.eval / f"{result.version.name}.json"
            if path.exists() or self._metrics is None:
                continue
            row = {
                "eval/accuracy": result.accuracy,
                "eval/pass_at_k": result.pass_at_k,
                "eval/response_tokens_mean": result.mean_tokens,
            }
            self._metrics.write("eval", result.version.step, row)
            path.parent.mkdir(exist_ok=True)
            write_json(path, asdict(result))
        return reply.num_pending

    def export(self, target: Path) -> None:
        """Write the model as it is now to `target`, in Hugging Face format."""
        tensors = self.policy.export()
        if self.processes.rank == 0:
            source = Path(self.config.model.path)
            publish.write_model(target, tensors, source, self.config.weights.save_shard_bytes)
        for _ in tensors:
            pass

    def _evaluation_is_due(self, step: int, known: EvaluationsReply) -> bool:
        every = self.config.eval.every
        is_due = every > 0 and (step % every == 0 or step == self.config.run.total_steps)
        return is_due and all(result.version.step != step for result in known.results)


def open_session(
    run: RunDir,
    config: RunConfig,
    processes: Processes,
    buffer: Buffer,
    *,
    is_asked_to_leave: Callable[[], bool] = lambda: False,
) -> Session:
    """Build the model with the weights it starts from; `resume` comes next.

    Raises Final for a model that cannot be trained so, or weights that are not that model's.
    """
    source = Path(config.model.path)
    with refusals_are_final():
        policy = Policy.of(config, source, processes, temperature=config.rollout.temperature)
        load_start(policy, config.model)
    settings = AdamSettings.of(config.optimizer, weight_decay=config.optimizer.weight_decay)
    return Session(
        run=run,
        config=config,
        processes=processes,
        buffer=buffer,
        policy=policy,
        optimizer=Optimizer(policy, settings),
        reference=Reference(policy) if config.loss.kl_coef > 0 else None,
        checkpoints=Checkpoints(
            run.checkpoints,
            processes,
            keep=config.learner.keep_checkpoints,
            is_async=config.learner.async_checkpoint,
        ),
        is_asked_to_leave=is_asked_to_leave,
    )
