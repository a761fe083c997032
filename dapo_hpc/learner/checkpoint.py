"""Checkpoints: model, optimizer, step, lineage and random state, readable by any parallel layout.

    checkpoints/ step_000010/ step_000012/ LATEST

A directory with such a name is whole: it is written under another one, made durable and renamed.
Each carries the digests of its files. Loading takes the newest one that is intact and names those
that are not. What the tensors are says checkpoint_state.py; the files, checkpoint_files.py; how
they are written beside training, checkpoint_writer.py.

The format is that of megatron.core.dist_checkpointing. Its common part is a pickle, which is why a
run directory belongs to one user.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from dapo_hpc.learner import checkpoint_files as files
from dapo_hpc.learner import checkpoint_state, cpu
from dapo_hpc.learner.checkpoint_files import FILES as FILES
from dapo_hpc.learner.checkpoint_files import LATEST as LATEST
from dapo_hpc.learner.checkpoint_writer import Save, make_plan
from dapo_hpc.learner.model import Policy
from dapo_hpc.learner.optimizer import Optimizer
from dapo_hpc.learner.parallel import Processes
from dapo_hpc.observe.final import Final

UNREADABLE = (
    OSError,
    KeyError,
    ValueError,
    RuntimeError,
    CheckpointingException,
    CheckpointException,
)
"""What Megatron and torch raise for a checkpoint of another model or with parts missing."""
MAX_CAUSE = 500
"""Characters of such an error that are shown; they list every tensor of the model."""

log = logging.getLogger(__name__)


class NoUsableCheckpoint(Final):
    """There are checkpoints, but none can be read; a person must look."""


class CheckpointNotWritten(RuntimeError):
    """The disk did not take a checkpoint. Those before it are whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where training stands."""

    step: int
    lineage: int = 0


class Checkpoints:
    """The checkpoints of one directory. Every method is collective, unless it says otherwise."""

    def __init__(
        self, directory: Path, processes: Processes, *, keep: int, is_async: bool = False
    ) -> None:
        """
        Args:
            directory: of all checkpoints of this training.
            processes: the ranks that train.
            keep: how many; older ones are deleted.
            is_async: `save` returns when the tensors are copied to host memory.
        """
        self._directory, self._processes = directory, processes
        self._keep, self._is_async = keep, is_async
        self._saving: Save | None = None
        """The last one begun."""
        self._unusable: set[int] = set()
        if processes.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            files.remove_temporary(directory)
        processes.barrier()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, durable, oldest first. Not collective."""
        return files.steps_in(self._directory)

    def save_when_due(
        self, policy: Policy, optimizer: Optimizer, progress: Progress, *, every: int, last: int
    ) -> bool:
        """`save` at every `every` steps and at step `last`, which is waited for; whether it did."""
        if progress.step % every and progress.step != last:
            return False
        self.save(policy, optimizer, progress)
        if progress.step == last:
            self.wait()
        return True

    def ensure(self, policy: Policy, optimizer: Optimizer, progress: Progress) -> None:
        """Returns when a checkpoint of this step is durable; `save` unless it is. There is none of
        step 0, which is the model that training starts from."""
        self.wait()
        is_there: bool = self._from_rank_0(lambda: progress.step in (0, *self.steps()))
        if not is_there:
            self.save(policy, optimizer, progress)
            self.wait()

    def save(self, policy: Policy, optimizer: Optimizer, progress: Progress) -> None:
        """Write a checkpoint; the one before it is waited for.

        Durability: it is durable, and `LATEST` names it, when this returns, or if `is_async` once
        `steps` lists it. A kill in between leaves those before it.

        Raises:
            CheckpointNotWritten: this one could not be written, or the one before it.
        """
        self.wait()
        step, root = progress.step, self._directory
        directory: Path = self._from_rank_0(lambda: files.make_temporary(root, step))
        state = checkpoint_state.describe(policy, optimizer) | {
            "progress": asdict(progress),
            "random_state": torch.get_rng_state(),
            "updates": {
                "num_updates": optimizer.num_updates,
                "num_skipped_in_a_row": optimizer.num_skipped_in_a_row,
            },
        }
        plan = make_plan(
            directory, state, is_snapshot=self._is_async, is_first=self._saving is None
        )
        self._saving = Save(plan, self._processes, root, step, self._retire)
        self._saving.start()
        if not self._is_async:
            self.wait()

    def wait(self) -> None:
        """Until what `save` began is durable.

        Raises CheckpointNotWritten when it cannot be written; PeerLost when another rank died.
        """
        if self._saving is not None:
            self._saving.join()
            self.check()

    def check(self) -> None:
        """Raise as `wait` does if what `save` began has failed. Not collective."""
        saving = self._saving
        if saving is None or saving.is_alive():
            return
        if saving.lost is not None:
            raise saving.lost
        if saving.problem:
            raise CheckpointNotWritten(
                f"checkpoint {saving.step} could not be written ({saving.problem}). Make sure that "
                f"there is space in {self._directory}, or lower learner.keep_checkpoints."
            )

    def load_newest(self, policy: Policy, optimizer: Optimizer) -> Progress | None:
        """Load the newest intact checkpoint; None if there never was one.

        Raises NoUsableCheckpoint when there are some and none is intact.
        """
        self.wait()
        # What rank 0 sees: a shared file system may show the others less.
        steps: list[int] = self._from_rank_0(self.steps)
        for step in reversed(steps):
            path = files.directory_of(self._directory, step)
            loaded = self._load(path, policy, optimizer)
            if not isinstance(loaded, str):
                return loaded
            self._unusable.add(step)
            log.warning("the checkpoint %s is not usable (%s); trying an older one.", path, loaded)
        if not steps:
            return None
        raise NoUsableCheckpoint(
            f"none of the {len(steps)} checkpoints in {self._directory} can be loaded (steps "
            f"{', '.join(map(str, steps))}); the warnings above say why. Restore one of them, or "
            "delete the directory to start from model.path again."
        )

    def _from_rank_0(self, ask: Callable[[], Any]) -> Any:
        """What `ask` answers on rank 0, on every rank."""
        answer = {"answer": ask()} if self._processes.rank == 0 else {}
        return self._processes.gather(answer)["answer"]

    def _load(self, path: Path, policy: Policy, optimizer: Optimizer) -> Progress | str:
        """The progress, or what is wrong with this checkpoint, the same on every rank."""
        here = self._processes
        problem = files.damage(path, here.rank, here.world)
        if here.agree(problem is not None):
            return problem or "another rank found it damaged"
        loaded: Progress | str
        try:
            loaded = _load(path, policy, optimizer)
        except UNREADABLE as error:
            loaded = f"{type(error).__name__}: {error}"[:MAX_CAUSE]
        failed = isinstance(loaded, str)
        if here.agree(failed) and not failed:
            return "another rank could not load it"
        return loaded

    def _retire(self, newest: int) -> None:
        """Keep the newest usable ones; delete older ones and those of an abandoned future."""
        self._unusable.discard(newest)
        past = [step for step in self.steps() if step <= newest and step not in self._unusable]
        for step in set(self.steps()) - set(past[-self._keep :]):
            files.discard(files.directory_of(self._directory, step))


def _load(path: Path, policy: Policy, optimizer: Optimizer) -> Progress:
    described = checkpoint_state.describe(policy, optimizer)
    with cpu.cuda_calls_on_cpu():
        loaded = dist_checkpointing.load(described, str(path))
        checkpoint_state.load(policy, optimizer, described, loaded)
    torch.set_rng_state(loaded["random_state"])
    return Progress(**loaded["progress"])
