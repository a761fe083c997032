"""Checkpoints: model, optimizer, step, lineage and random state, readable by any parallel layout.

    checkpoints/ step_000010/ step_000012/ LATEST

A checkpoint is written to a temporary directory, made durable and renamed, so a directory with a
final name is whole. Each carries the digests of its files. Loading takes the newest one that is
intact and names those that are not.

The tensors are in the format of megatron.core.dist_checkpointing. Its common part is a pickle,
which is why a run directory belongs to one user.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistSaveShardedStrategy,
)
from torch.distributed.checkpoint.api import CheckpointException

from dapo_hpc.learner import cpu
from dapo_hpc.learner.model import Policy
from dapo_hpc.learner.optimizer import Optimizer
from dapo_hpc.learner.parallel import Processes
from dapo_hpc.run_dir import fsync_directory, write_json, write_text

LATEST = "LATEST"
FILES = "files.json"
"""Name -> [bytes, sha256] of every other file of a checkpoint."""
TEMPORARY = ".tmp-"

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


class NoUsableCheckpoint(RuntimeError):
    """There are checkpoints, but none can be read; a person must look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where training stands."""

    step: int
    lineage: int = 0


class Checkpoints:
    """The checkpoints of one directory. Every method is collective."""

    def __init__(self, directory: Path, processes: Processes, *, keep: int) -> None:
        self._directory, self._processes, self._keep = directory, processes, keep
        if processes.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            for left in directory.glob(f"{TEMPORARY}*"):
                shutil.rmtree(left)
        processes.barrier()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        found = self._directory.glob("step_*")
        return sorted(int(path.name.removeprefix("step_")) for path in found)

    def save(self, policy: Policy, optimizer: Optimizer, progress: Progress) -> None:
        """Write a checkpoint. It is durable, and `LATEST` names it, when this returns.

        Only the newest `keep` are kept.
        """
        final = self._path(progress.step)
        temporary = final.with_name(TEMPORARY + final.name)
        if self._processes.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        self._processes.barrier()
        state = _tensors(policy, optimizer, is_loading=False)
        state |= {"progress": asdict(progress), "random_state": torch.get_rng_state()}
        with cpu.cuda_calls_on_cpu(), _written_in_this_process():
            strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
            dist_checkpointing.save(
                state, str(temporary), strategy, content_metadata={}, validate_access_integrity=True
            )
        self._finish(temporary, final)

    def load_newest(self, policy: Policy, optimizer: Optimizer) -> Progress | None:
        """Load the newest intact checkpoint; None if there never was one.

        Raises NoUsableCheckpoint when there are some and none is intact.
        """
        steps = self.steps()
        for step in reversed(steps):
            problem = self._load(self._path(step), policy, optimizer)
            if not isinstance(problem, str):
                return problem
            log.warning("checkpoint %s is not usable (%s); trying an older one.", step, problem)
        if not steps:
            return None
        raise NoUsableCheckpoint(
            f"none of the {len(steps)} checkpoints in {self._directory} can be loaded (steps "
            f"{', '.join(map(str, steps))}). Restore one of them, or delete the directory to start "
            "from model.path again."
        )

    def _path(self, step: int) -> Path:
        return self._directory / f"step_{step:06d}"

    def _load(self, path: Path, policy: Policy, optimizer: Optimizer) -> Progress | str:
        """The progress, or what is wrong with this checkpoint, the same on every rank."""
        problem = self._damage(path)
        if self._processes.agree(problem is not None):
            return problem or "another rank found it damaged"
        loaded: Progress | str
        try:
            loaded = _load(path, policy, optimizer)
        except UNREADABLE as error:
            loaded = f"{type(error).__name__}: {error}"[:MAX_CAUSE]
        failed = isinstance(loaded, str)
        if self._processes.agree(failed) and not failed:
            return "another rank could not load it"
        return loaded

    def _damage(self, path: Path) -> str | None:
        """What differs between this rank's share of the files and their digests."""
        try:
            expected = json.loads((path / FILES).read_text())
            for name in sorted(expected)[self._processes.rank :: self._processes.world]:
                if _digest(path / name) != expected[name]:
                    return f"{name} does not match its digest"
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _finish(self, temporary: Path, final: Path) -> None:
        """Digest and make durable, each rank a share of the files; then rank 0 renames."""
        here = self._processes
        here.barrier()
        names = sorted(path.name for path in temporary.iterdir())
        mine = {name: _settled(temporary / name) for name in names[here.rank :: here.world]}
        digests = here.gather(mine)
        if here.rank == 0:
            write_json(temporary / FILES, digests)
            fsync_directory(temporary)
            shutil.rmtree(final, ignore_errors=True)  # of an abandoned lineage
            os.rename(temporary, final)
            write_text(self._directory / LATEST, final.name + "\n")
            self._retire(int(final.name.removeprefix("step_")))
        here.barrier()

    def _retire(self, newest: int) -> None:
        """Keep the newest; delete older ones and those of an abandoned future."""
        past = [step for step in self.steps() if step <= newest]
        for step in set(self.steps()) - set(past[-self._keep :]):
            shutil.rmtree(self._path(step))


def _tensors(policy: Policy, optimizer: Optimizer, *, is_loading: bool) -> dict[str, Any]:
    metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    with cpu.cuda_calls_on_cpu():
        model = policy.module.sharded_state_dict(metadata=metadata)
        states = optimizer.megatron.sharded_state_dict(
            model, is_loading=is_loading, metadata=metadata
        )
    return {"model": model, "optimizer": states}


def _load(path: Path, policy: Policy, optimizer: Optimizer) -> Progress:
    state = _tensors(policy, optimizer, is_loading=True)
    with cpu.cuda_calls_on_cpu():
        state = dist_checkpointing.load(state, str(path))
        policy.module.load_state_dict(state["model"])
        optimizer.load_state(state["optimizer"])
    torch.set_rng_state(state["random_state"])
    return Progress(**state["progress"])


@contextmanager
def _written_in_this_process() -> Iterator[None]:
    """Let Megatron write its files here and now.

    Its own way suits saves that outlive the call: one forked process for each file, and a
    `multiprocessing.Manager`, a whole new Python that imports torch, to hand back their results.
    That costs seconds for each learner, and forks survive when the learner is killed.
    """
    writer = filesystem_async.FileSystemWriterAsync
    forking = writer.write_preloaded_data_multiproc
    writer.write_preloaded_data_multiproc = staticmethod(_write_files)
    filesystem_async._results_queue = queue.SimpleQueue()
    try:
        yield
    finally:
        writer.write_preloaded_data_multiproc = staticmethod(forking)
        filesystem_async._results_queue = None


def _write_files(
    transforms: list[Any], _use_msc: bool, _rank: int, buckets: list[Any], results: Any
) -> None:
    """Write each bucket to its file; what was written, or the first error, goes to `results`."""
    written: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        answers: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        pending: queue.Queue[int] = queue.Queue()
        pending.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, answers, pending, True
        )
        _, written[number] = answers.get()
        if isinstance(written[number], Exception):
            results.put(written[number])
            return
    results.put(written)


def _settled(path: Path) -> list[int | str]:
    """Make a file durable; its digest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _digest(path)


def _digest(path: Path) -> list[int | str]:
    """Bytes and sha256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return [path.stat().st_size, digest]
