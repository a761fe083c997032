"""The model of any rank of any layout, in one process and without memory for its weights.

Parameters lie on torch's meta device: they have shapes and no numbers. Parallel groups are those of
torch's "fake" backend, in which a process may call itself rank 5 of 64 and every collective returns
at once. So Megatron itself says what a rank holds and how it is laid out in a checkpoint; nothing
of that is written down twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # documented, not in stubs
from torch.overrides import TorchFunctionMode

from dapo_hpc.learner import cpu
from dapo_hpc.learner.model import build, megatron_config, require_supported
from dapo_hpc.learner.parallel import Layout, Processes, disconnect, form_groups
from dapo_hpc.weights import names
from dapo_hpc.weights.families import OUTPUT
from dapo_hpc.weights.names import ModelShape

META = torch.device("meta")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankModel:
    """What one rank would hold."""

    tensor_rank: int
    pipeline_rank: int
    first_layer: int
    """Global number (from 0) of its layer 0."""
    num_layers: int
    shapes: dict[str, tuple[int, ...]]
    """Of its parameters, by Megatron's name."""

    @property
    def num_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())


def dry_run(hf: Any, layout: Layout, *, dtype: torch.dtype) -> list[RankModel]:
    """Build every tensor-parallel rank of every pipeline stage; nothing is allocated.

    Every parameter's name and shape is compared with what `weights.names` says the rank loads.
    Data-parallel ranks hold the same. To be called where no learner is connected.

    Args:
        hf: transformers config.
        layout: of the learner.
        dtype: of the parameters.

    Raises:
        ValueError: the learner cannot train the model in this layout.
    """
    require_supported(hf, layout)
    shape = ModelShape.of(hf)
    replica = Layout(layout.tensor, layout.pipeline)
    found = []
    for rank in range(replica.world):
        with as_rank(replica, rank) as here:
            module = build_on_meta(hf, shape, here, dtype)
            found.append(_describe(module, here))
            _compare(found[-1], shape, replica)
    return found


@contextmanager
def as_rank(layout: Layout, rank: int) -> Iterator[Processes]:
    """Be one rank of a layout whose other ranks do not exist; collectives do nothing."""
    logging.getLogger("megatron").setLevel(logging.WARNING)
    cpu.install()
    store = HashStore()
    dist.init_process_group("fake", rank=rank, world_size=layout.world, store=store)
    try:
        form_groups(layout)
        cpu.use_plain_random_state()
        yield Processes(layout, rank, store, META)
    finally:
        disconnect()


def build_on_meta(hf: Any, shape: ModelShape, here: Processes, dtype: torch.dtype) -> Any:
    """The GPTModel of this rank, without memory."""
    config = megatron_config(hf, shape, here, dtype, sequence_parallel=here.layout.tensor > 1)
    with META, _StaysOnMeta():
        return build(config, shape, here)


class _StaysOnMeta(TorchFunctionMode):
    """Megatron moves tied embeddings to the GPU while it builds; there is nothing to move."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return args[0] if func is torch.Tensor.cuda else func(*args, **(kwargs or {}))


def _describe(module: Any, here: Processes) -> RankModel:
    layers = module.decoder.layers
    return RankModel(
        tensor_rank=here.tensor_rank,
        pipeline_rank=here.pipeline_rank,
        first_layer=int(layers[0].layer_number) - 1,
        num_layers=len(layers),
        shapes={name: tuple(p.shape) for name, p in module.named_parameters()},
    )


def _compare(rank: RankModel, shape: ModelShape, layout: Layout) -> None:
    """An error of this program, not of a config, when they differ."""
    wanted = names.megatron_names(shape, rank.first_layer, rank.num_layers)
    if shape.is_tied and layout.pipeline > 1 and rank.pipeline_rank == layout.pipeline - 1:
        wanted.append(OUTPUT)  # the embedding's copy
    expected = {}
    for name in wanted:
        entry = names.entry(shape, name, first_layer=rank.first_layer)
        expected[name] = names.local_shape(entry, shape, layout.tensor)
    different = sorted(dict(rank.shapes.items() ^ expected.items()))
    assert not different, (
        f"weights/names.py and Megatron disagree about {different[0]} and {len(different) - 1} "
        f"more: {expected.get(different[0])} and {rank.shapes.get(different[0])}"
    )
