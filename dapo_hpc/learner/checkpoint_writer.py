"""Writing a checkpoint beside training: each rank writes one file, in a thread of its own.

The thread takes part in no collective: a rank tells rank 0 through the store what it wrote, and
rank 0 gives the checkpoint its name when all have. So a checkpoint is durable as soon as it is
written, whatever the training is waiting for. A thread dies with its process, so nobody writes on
after a kill; and should a node that was given up for dead still write, its directory has a name
that nobody else uses.

Megatron plans who writes what. Its own writer forks a process for each file and starts a manager
process, which costs seconds on a small model and leaves orphans behind when the learner is killed.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed import DistError
from torch.distributed.checkpoint.filesystem import (
    SerializationFormat,
    _StorageInfo,
    _write_item,
)
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from dapo_hpc.buffer.messages import decode, encode
from dapo_hpc.learner import checkpoint_files as files
from dapo_hpc.learner import cpu
from dapo_hpc.learner.checkpoint_files import Digest
from dapo_hpc.learner.parallel import PeerLost, Processes
from dapo_hpc.run_dir import write_json, write_text

CHUNK_BYTES = 16 * 2**20
"""Between two looks whether the process still lives."""
MIN_POLL_S, MAX_POLL_S = 0.005, 0.5
"""Between two questions to the store."""

log = logging.getLogger(__name__)


class ProcessEnds(Exception):
    """The process is about to leave, and its threads with it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What this rank writes, and on rank 0 what all of them write."""

    directory: Path
    writer: Any
    """Megatron's FileSystemWriterAsync; it holds this rank's tensors."""
    metadata: Any
    """torch's Metadata of the whole checkpoint; None except on rank 0."""


class _OnlyPlanned(TorchDistSaveShardedStrategy):  # type: ignore[misc]  # Megatron has no types
    """Megatron's strategy up to the point where something is written."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)
        self.planned: tuple[Any, Any] | None = None

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> AsyncRequest:
        _, metadata, _ = planned
        self.planned = (writer, metadata)
        return AsyncRequest(None, (), [])


def make_plan(directory: Path, state: dict[str, Any], *, is_snapshot: bool, is_first: bool) -> Plan:
    """Agree with the other ranks on who writes what; rank 0 writes what is no tensor. Collective.

    Args:
        directory: exists, empty.
        state: as dist_checkpointing.save takes it.
        is_snapshot: copy the tensors to host memory, because training goes on.
        is_first: have Megatron check that every number is written once; all plans are alike.
    """
    strategy = _OnlyPlanned()
    filesystem_async._results_queue = queue.SimpleQueue()  # else Megatron starts a process for it
    with cpu.cuda_calls_on_cpu():
        dist_checkpointing.save(
            state,
            str(directory),
            strategy,
            async_sharded_save=True,
            content_metadata={},
            validate_access_integrity=is_first,
        )
    assert strategy.planned is not None, "Megatron plans before it returns"
    plan = Plan(directory, *strategy.planned)
    if is_snapshot:
        for _, _, (_, tensors) in plan.writer.write_buckets:
            tensors[:] = [(item, _copied(tensor)) for item, tensor in tensors]
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies are under way together
    return plan


def _copied(tensor: Tensor) -> Tensor:
    """In host memory: a GPU's tensor in pinned pages, which torch keeps for the next checkpoint. To
    be used after a synchronization."""
    source = tensor.detach()
    copy = torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
    return copy.copy_(source, non_blocking=True)


# ------------------------------------------------------------------ writing


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a part of a tensor lies in a file."""

    name: str
    offsets: list[int] | None
    """Of its corner in the whole tensor; None for what is no tensor."""
    index: int | None
    """Among the parts of that tensor on its rank; torch's hint for looking it up."""
    position: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Written:
    """What one rank wrote and made durable."""

    files: dict[str, Digest]
    pieces: dict[str, list[Piece]]
    """By file."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A rank's word to rank 0."""

    written: Written
    problem: str = ""


class _DigestingFile:
    """A file that is hashed as it is written; the part of io that torch.save uses."""

    def __init__(self, file: BinaryIO, check: Callable[[], None]) -> None:
        self._file, self._check = file, check
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        for start in range(0, len(view), CHUNK_BYTES):
            self._check()
            chunk = view[start : start + CHUNK_BYTES]
            self._file.write(chunk)
            self._hash.update(chunk)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()

    def settle(self) -> Digest:
        """Make it durable."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return [self._size, self._hash.hexdigest()]


def write(plan: Plan, check: Callable[[], None]) -> Written:
    """Write this rank's tensors and let go of them; they are durable when this returns.

    Args:
        plan: of make_plan.
        check: called now and then; what it raises ends the writing.
    """
    written = Written({}, {})
    for path, name, (objects, tensors) in plan.writer.write_buckets or ():
        with open(path, "wb") as raw:
            file = _DigestingFile(raw, check)
            written.pieces[name] = list(_write_items(plan.writer, name, file, objects, tensors))
            written.files[name] = file.settle()
    plan.writer.write_buckets = []
    return written


def _write_items(
    writer: Any, name: str, file: _DigestingFile, objects: list[Any], tensors: list[Any]
) -> Iterator[Piece]:
    for item, data in itertools.chain(objects, ((item, tensor.cpu()) for item, tensor in tensors)):
        saved = _write_item(
            writer.transforms,
            file,  # type: ignore[arg-type]  # all of a file that is used
            data,
            item,
            name,
            SerializationFormat.TORCH_SAVE,
        )
        yield _piece(saved)


def _piece(result: WriteResult) -> Piece:
    index, place = result.index, result.storage_data
    offsets = None if index.offset is None else list(index.offset)
    return Piece(index.fqn, offsets, index.index, place.offset, place.length)


def _result(piece: Piece, file: str) -> WriteResult:
    offsets = None if piece.offsets is None else torch.Size(piece.offsets)
    return WriteResult(
        index=MetadataIndex(piece.name, offsets, piece.index),
        size_in_bytes=piece.num_bytes,
        storage_data=_StorageInfo(file, piece.position, piece.num_bytes),
    )


def finish(plan: Plan, answers: list[Written], root: Path, step: int) -> None:
    """On rank 0, after all ranks have written: index, digests, the final name, LATEST."""
    results = [
        [_result(piece, file) for file, pieces in written.pieces.items() for piece in pieces]
        for written in answers
    ]
    plan.writer.finish(plan.metadata, results)
    save_config(CheckpointingConfig("torch_dist", 1), str(plan.directory))
    digests = {name: digest for written in answers for name, digest in written.files.items()}
    for path in plan.directory.iterdir():
        if path.name not in digests:
            digests[path.name] = files.settle(path)
    write_json(plan.directory / files.FILES, digests)
    final = files.directory_of(root, step)
    files.discard(final)  # of an abandoned lineage
    os.rename(plan.directory, final)
    write_text(root / files.LATEST, final.name + "\n")


class Save(threading.Thread):
    """A checkpoint on its way to disk, on one rank. `start` it, and `join` it some day.

    Every rank's thread ends with the same verdict, when rank 0 has given the checkpoint its name or
    given it up.
    """

    def __init__(
        self, plan: Plan, here: Processes, root: Path, step: int, retire: Callable[[int], None]
    ) -> None:
        """
        Args:
            plan: of make_plan.
            here: this rank.
            root: directory of all checkpoints.
            step: of this one.
            retire: called on rank 0 with the step when it is durable.
        """
        super().__init__(name=f"checkpoint-{step}")
        self.step = step
        self.problem = "the thread that wrote it died; its traceback is in this log"
        """Why it failed; empty once it is durable."""
        self.lost: PeerLost | None = None
        """Another rank died, so there is no verdict."""
        self._plan, self._here, self._root, self._retire = plan, here, root, retire
        self._began_s = time.monotonic()

    def run(self) -> None:
        try:
            self._tell(f"rank/{self._here.rank}", encode(self._write()))
            if self._here.rank == 0:
                self._tell("verdict", self._conclude().encode())
            self.problem = self._listen("verdict").decode()
        except PeerLost as error:
            self.lost = error
        except DistError as error:
            self.lost = PeerLost(f"rank 0 of the learner is gone ({error}).")
        except ProcessEnds:
            self.problem = "the process ends"

    def _write(self) -> Answer:
        """Write this rank's part."""
        try:
            return Answer(write(self._plan, _require_living_process))
        except (OSError, RuntimeError) as error:
            return Answer(
                Written({}, {}), f"rank {self._here.rank}: {type(error).__name__}: {error}"
            )

    def _conclude(self) -> str:
        """On rank 0, once all ranks have written; what went wrong, on whichever rank."""
        answers = [decode(self._listen(f"rank/{rank}"), Answer) for rank in range(self._here.world)]
        problems = [answer.problem for answer in answers if answer.problem]
        if problems:
            return "; ".join(problems)
        written = [answer.written for answer in answers]
        try:
            finish(self._plan, written, self._root, self.step)
            self._retire(self.step)
        except OSError as error:
            return self._told(error)
        self._report(written)
        return ""

    def _report(self, written: list[Written]) -> None:
        num_bytes = sum(int(size) for part in written for size, _ in part.files.values())
        took_s = time.monotonic() - self._began_s
        log.info(
            "checkpoint %d is durable: %.1f MiB in %.1f s.", self.step, num_bytes / 2**20, took_s
        )

    def _told(self, error: Exception) -> str:
        return f"rank {self._here.rank}: {type(error).__name__}: {error}"

    def _tell(self, what: str, message: bytes) -> None:
        self._here.store.set(self._key(what), message)  # type: ignore[arg-type]  # takes bytes

    def _listen(self, what: str) -> bytes:
        """What somebody told; waits for it."""
        key, delay_s = self._key(what), MIN_POLL_S
        # `get` alone would hold the store's lock, and with it whatever else this process asks.
        while not self._here.store.check([key]):
            _require_living_process()
            self._here.check_peers()
            time.sleep(delay_s)
            delay_s = min(2 * delay_s, MAX_POLL_S)
        return bytes(self._here.store.get(key))

    def _key(self, what: str) -> str:
        return f"checkpoint/{self._plan.directory.name}/{what}"


def _require_living_process() -> None:
    if not threading.main_thread().is_alive():
        raise ProcessEnds
