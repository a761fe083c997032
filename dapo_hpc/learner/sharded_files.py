"""Parameters in and out of a checkpoint's files one at a time, by a single process.

A checkpoint is in the format of torch.distributed.checkpoint: pieces of global tensors in any
number of files, and an index of them (a pickle, so only checkpoints of one's own are opened). Which
pieces make up a parameter, Megatron says (`meta_model.sharded_state`); torch's own storage classes
read and write them.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

INDEX_FILE = ".metadata"


class ShardedReader:
    """The parameters in a checkpoint's files. Memory: what is asked for, and one piece."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._storage = FileSystemReader(directory)
        self._index = self._storage.read_metadata()
        self._storage.set_up_storage_reader(self._index, is_coordinator=True)

    def dtype(self, parameter: Any) -> torch.dtype:
        """Type of a parameter's numbers in the files.

        Args:
            parameter: of `sharded_state`.
        """
        found: torch.dtype = self._stored(_pieces(parameter, parameter.data)[0]).properties.dtype
        return found

    def read(self, parameter: Any) -> Tensor:
        """The part of a parameter that `parameter`, an entry of `sharded_state`, describes.

        Raises:
            ValueError: the files do not hold it, or hold a model of another shape.
        """
        target = torch.empty(parameter.data.shape, dtype=self.dtype(parameter))
        for piece in _pieces(parameter, target):
            self._fill(piece)
        return target

    def _fill(self, piece: Any) -> None:
        wanted = _chunk(piece)
        items = create_read_items_for_chunk_list(piece.key, self._stored(piece), [wanted])
        found = sum(item.lengths.numel() for item in items)
        if found != wanted.sizes.numel():
            raise ValueError(
                f"{self._directory} holds {found} of the {wanted.sizes.numel()} numbers of "
                f"{piece.key} at {list(wanted.offsets)}; the checkpoint is not whole."
            )
        planner = _Into(piece.data.view(wanted.sizes))
        self._storage.read_data(LoadPlan(items), planner).wait()

    def _stored(self, piece: Any) -> TensorStorageMetadata:
        stored = self._index.state_dict_metadata.get(piece.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise ValueError(
                f"{self._directory} holds no {piece.key}; the checkpoint is of another model."
            )
        # Embeddings are filled up to a multiple of the ranks that wrote them.
        pairs = zip(stored.size, piece.global_shape, strict=True)
        fits = all(have >= want for have, want in pairs) and piece.allow_shape_mismatch
        if tuple(stored.size) != tuple(piece.global_shape) and not fits:
            raise ValueError(
                f"{self._directory}: {piece.key} is {list(stored.size)}, but the model's "
                f"config.json makes it {list(piece.global_shape)}. The checkpoint is of another "
                "model."
            )
        return stored


@dataclass(frozen=True, slots=True)
class Writing:
    """A parameter, or a part of one, to be written."""

    sharded: Any
    """Its entry of `sharded_state`."""
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """Its numbers; called when they are written, and dropped afterwards."""


def write_sharded(directory: Path, groups: Iterable[list[Writing]], common: dict[str, Any]) -> None:
    """Write a checkpoint that `megatron.core.dist_checkpointing` loads in any layout.

    Memory: what torch's writer keeps of one group, which is at most the group.

    Args:
        directory: must exist, empty.
        groups: each becomes a file, for example a layer.
        common: what is no tensor.
    """
    planner = _Lazy()
    plans, index = create_default_global_save_plan([SavePlan(planner.items(g)) for g in groups])
    writer = FileSystemWriter(directory, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(is_coordinator=True)
    plans = writer.prepare_global_plan(plans)
    writer.finish(index, [writer.write_data(plan, planner).wait() for plan in plans])
    torch.save(common, directory / COMMON_STATE_FNAME)
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))


class _Into(DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        del index
        return self._target


class _Lazy(DefaultSavePlanner):
    """Makes each tensor when the writer asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[MetadataIndex, tuple[Writing, int]] = {}
        self._made: tuple[Writing, list[Any]] | None = None

    def items(self, group: list[Writing]) -> list[WriteItem]:
        """What is to be written of a group; nothing is made yet."""
        return [item for writing in group for item in self._items(writing)]

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        writing, number = self._sources[write_item.index]
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([writing.sharded.data], buffer)  # a list, as Megatron's loader expects
            return buffer
        if self._made is None or self._made[0] is not writing:
            self._made = None
            self._made = (writing, _pieces(writing.sharded, writing.make().to(writing.dtype)))
        piece = self._made[1][number]
        numbers: Tensor = piece.data.reshape(_chunk(piece).sizes)
        return numbers

    def _items(self, writing: Writing) -> list[WriteItem]:
        sharded = writing.sharded
        if not is_main_replica(sharded.replica_id):
            return []
        if isinstance(sharded, ShardedObject):
            index = MetadataIndex(sharded.unique_key)
            self._sources[index] = (writing, 0)
            return [WriteItem(index=index, type=WriteItemType.BYTE_IO)]
        items = []
        for number, piece in enumerate(_pieces(sharded, sharded.data)):
            index = MetadataIndex(piece.key, _chunk(piece).offsets)
            self._sources[index] = (writing, number)
            data = TensorWriteData(
                chunk=_chunk(piece),
                properties=TensorProperties(dtype=writing.dtype),
                size=torch.Size(piece.global_shape),
            )
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        return items


def _pieces(parameter: Any, data: Tensor) -> list[Any]:
    """What Megatron stores of a parameter whose numbers are `data`; each piece a view of it."""
    if isinstance(parameter, ShardedTensorFactory):
        built: list[Any] = dataclasses.replace(parameter, data=data).build()
        return built
    return [dataclasses.replace(parameter, data=data, dtype=data.dtype)]


def _chunk(piece: Any) -> ChunkStorageMetadata:
    """Where a piece lies in its global tensor; axes in front of its own (the layer) have size 1."""
    sizes = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
    return ChunkStorageMetadata(offsets=torch.Size(piece.global_offset), sizes=torch.Size(sizes))
