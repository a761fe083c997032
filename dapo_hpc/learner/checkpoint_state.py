"""What a checkpoint holds, tensor by tensor, in the terms of megatron.core.dist_checkpointing.

model       parameters in the model's type, as Megatron describes them
optimizer   float32: both moments, and the main parameters beside bfloat16 ones; cut into boxes

With the distributed optimizer a rank holds any run of numbers of a flattened parameter, and
Megatron's own checkpoints of it cannot be read back without TransformerEngine or Apex. But a run of
a matrix is at most three boxes (the end of a row, whole rows, the beginning of a row), and
dist_checkpointing stores boxes of whole tensors, whoever wrote them. So every rank writes what it
holds and reads what it needs, without asking another rank, and a checkpoint says nothing of the
layout it was written in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from torch import Tensor

from dapo_hpc.learner import cpu
from dapo_hpc.learner.model import Policy
from dapo_hpc.learner.optimizer import Optimizer, Shard

MAIN = "fp32_param"
"""Beside the moments' names: float32 main parameters. Megatron's own word for them."""
EXTRA = "_extra_state"
"""torch's ending for what a layer remembers beside its parameters."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a matrix that is one run of the flattened matrix."""

    row: int
    column: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns


def boxes(start: int, end: int, width: int) -> Iterator[Box]:
    """Cut the run [start, end) of a flattened matrix of `width` columns into at most three boxes.

    They come in the order of the run, and none is empty.
    """
    while start < end:
        row, column = divmod(start, width)
        whole_rows = (end - start) // width
        if column == 0 and whole_rows > 0:
            box = Box(row, 0, whole_rows, width)
        else:
            box = Box(row, column, 1, min(width - column, end - start))
        yield box
        start += box.size


def describe(policy: Policy, optimizer: Optimizer) -> dict[str, Any]:
    """The tensors of this rank's model and optimizer and their places in whole tensors."""
    with cpu.cuda_calls_on_cpu():
        model = sharded_parameters(policy.module)
        # The same parameters, but each layer with names of its own; boxes lie in no list of layers.
        by_layer = sharded_state(policy.module, non_homogeneous_layers=True)
    writers = _Writers(model)
    return {
        "model": {name: writers.whole(name, sharded) for name, sharded in model.items()},
        "optimizer": dict(_optimizer_state(policy, optimizer, by_layer, writers)),
    }


def load(policy: Policy, optimizer: Optimizer, described: Any, loaded: Any) -> None:
    """Put what dist_checkpointing loaded for `described` in its place."""
    fill(policy.module, loaded["model"])
    for name, box in described["optimizer"].items():
        box.data.copy_(loaded["optimizer"][name])
    optimizer.resume(**loaded["updates"])


def sharded_state(module: Any, **options: bool) -> dict[str, Any]:
    """Where each parameter lies in a checkpoint, as Megatron describes it, by parameter name."""
    metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    found: dict[str, Any] = module.sharded_state_dict(metadata={**metadata, **options})
    return found


def sharded_parameters(module: Any) -> dict[str, Any]:
    """The parameters of `sharded_state` alone: what else some layers remember, the scales of 8-bit
    arithmetic, is unused here, and TransformerEngine's layers have more of it than Megatron's."""
    state = sharded_state(module)
    return {name: part for name, part in state.items() if not isinstance(part, ShardedObject)}


def fill(module: Any, loaded: dict[str, Tensor]) -> None:
    """Put what was loaded for `sharded_parameters` in its place."""
    found = module.load_state_dict(loaded, strict=False)
    missing = [name for name in found.missing_keys if not name.endswith(EXTRA)]
    assert not missing + found.unexpected_keys, f"not loaded: {missing + found.unexpected_keys}"


class _Writers:
    """Who writes what every data-parallel rank holds: whole parameters, nearly as much for each."""

    def __init__(self, model: dict[str, Any]) -> None:
        """Every data-parallel rank comes to the same result, because it holds the same model."""
        self._num_ranks = mpu.get_data_parallel_world_size(with_context_parallel=True)
        self._ranks: dict[str, int] = {}
        loads = [0] * self._num_ranks
        for name, sharded in model.items():
            self._ranks[name] = loads.index(min(loads))
            loads[self._ranks[name]] += sharded.data.numel()

    def whole(self, name: str, sharded: Any) -> Any:
        """A parameter that all data-parallel ranks hold."""
        return dataclasses.replace(sharded, replica_id=self.replica(name, sharded))

    def replica(self, name: str, sharded: Any) -> tuple[int, int, int]:
        """(0, 0, 0) on the rank that writes it."""
        stage, tensor, data = sharded.replica_id
        return (stage, tensor, (data - self._ranks[name]) % self._num_ranks)


@dataclass(frozen=True, slots=True)
class _Part:
    """A box that this rank holds of a whole tensor."""

    key: str
    """Of the parameter in a checkpoint."""
    whole: tuple[int, ...]
    corner: tuple[int, ...]
    sizes: tuple[int, ...]
    place: int
    """Of its first number in this rank's run."""

    def of(self, state: str, run: Tensor, replica: tuple[int, int, int]) -> ShardedTensor:
        """The box of a run of numbers that belongs to the same parameter."""
        numbers = run[self.place : self.place + math.prod(self.sizes)]
        return ShardedTensor(
            key=f"optimizer.state.{state}.{self.key}",
            data=numbers.view(self.sizes),
            dtype=run.dtype,
            local_shape=self.sizes,
            global_shape=self.whole,
            global_offset=self.corner,
            axis_fragmentations=None,  # boxes of any size
            replica_id=replica,
        )


def _optimizer_state(
    policy: Policy, optimizer: Optimizer, by_layer: dict[str, Any], writers: _Writers
) -> Iterator[tuple[str, ShardedTensor]]:
    """Boxes by a name that is unique on this rank."""
    for shard in optimizer.shards:
        sharded = by_layer[shard.name]
        replica = writers.replica(shard.name, sharded)
        if policy.is_optimizer_distributed:  # no other data-parallel rank holds it
            replica = (*sharded.replica_id[:2], 0)
        states = shard.moments | ({MAIN: shard.main} if shard.has_main_copy else {})
        for number, part in enumerate(_parts(shard, sharded, policy.shape.vocab)):
            for state, tensor in states.items():
                run = tensor.detach().view(-1)
                yield f"{state}/{shard.name}/{number}", part.of(state, run, replica)


def _parts(shard: Shard, sharded: Any, vocab: int) -> Iterator[_Part]:
    """The boxes of this rank's run of a parameter."""
    for piece, first in _pieces(shard, sharded):
        is_vector = len(piece.local_shape) == 1
        height, width = (1, *piece.local_shape) if is_vector else piece.local_shape
        whole = piece.global_shape
        if piece.allow_shape_mismatch:
            # Embeddings are filled up to a multiple of the ranks; a checkpoint need not know.
            whole = (vocab, *whole[1:])
            height = max(0, min(height, vocab - piece.global_offset[0]))
        start = max(shard.start - first, 0)
        end = min(shard.start - first + shard.main.numel(), height * width)
        for box in boxes(start, end, width):
            corner = (box.row, box.column)[is_vector:]
            yield _Part(
                key=piece.key,
                whole=whole,
                corner=tuple(a + b for a, b in zip(piece.global_offset, corner, strict=True)),
                sizes=(box.rows, box.columns)[is_vector:],
                place=first + box.row * width + box.column - shard.start,
            )


def _pieces(shard: Shard, sharded: Any) -> list[tuple[ShardedTensor, int]]:
    """What Megatron stores of a parameter, and where each piece begins in the flattened one.

    Gate and up projection are one parameter in memory and two pieces in a checkpoint.
    """
    if not isinstance(sharded, ShardedTensorFactory):
        return [(sharded, 0)]
    pieces = sharded.build()
    for piece in pieces:
        assert piece.data.is_contiguous(), f"{shard.name} has pieces that are no run of numbers"
    start = shard.parameter.storage_offset()
    return [(piece, piece.data.storage_offset() - start) for piece in pieces]
