"""How many parameters a rank holds, and how many of them train.

The same parameters as in Megatron's model, with the same padding: matrices split over the
tensor-parallel ranks, layers over the pipeline stages, embedding and output layer on the first and
the last of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from dapo_hpc.config import Frozen, LearnerSection
from dapo_hpc.plan.architecture import Architecture
from dapo_hpc.weights.families import EMBEDDING, FINAL_NORM, OUTPUT, Dim, Table


@dataclass(frozen=True, slots=True)
class Stage:
    """A pipeline stage."""

    index: int
    count: int
    first_layer: int
    num_layers: int

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


def stages(architecture: Architecture, learner: LearnerSection) -> list[Stage]:
    count = learner.pipeline_parallel
    each = architecture.num_layers // count
    return [Stage(index, count, index * each, each) for index in range(count)]


@dataclass(frozen=True, slots=True)
class Parameters:
    """Elements on one rank of a stage."""

    held: int
    trained: int


def rank_parameters(
    architecture: Architecture, learner: LearnerSection, stage: Stage
) -> Parameters:
    """Of one tensor-parallel rank of a stage."""
    frozen = Frozen.of(learner.freeze)
    layer = layer_elements(architecture, learner.tensor_parallel)
    names = [f"decoder.layers.{number}." for number in range(stage.num_layers)]
    found = dict.fromkeys(names, layer) | _ends(architecture, learner.tensor_parallel, stage)
    trained = sum(
        size
        for name, size in found.items()
        if not frozen.holds(name, first_layer=stage.first_layer, is_tied=architecture.is_tied)
    )
    return Parameters(sum(found.values()), trained)


def model_elements(architecture: Architecture) -> int:
    """Of the whole model, without padding: what its safetensors hold."""
    whole = Stage(0, 1, 0, architecture.num_layers)
    layers = architecture.num_layers * layer_elements(architecture, 1)
    return layers + sum(_ends(architecture, 1, whole).values())


def layer_elements(
    architecture: Architecture, tensor_parallel: int, kv_heads: int | None = None
) -> int:
    """Of one decoder layer on one tensor-parallel rank.

    Args:
        architecture: of the model.
        tensor_parallel: ranks.
        kv_heads: on this rank; None: an equal share.
    """
    return _elements(architecture, architecture.family.layer, tensor_parallel, kv_heads)


def table_elements(architecture: Architecture, tensor_parallel: int) -> int:
    """Of the embedding, or of the output layer, on one rank."""
    top = architecture.family.top
    return _elements(architecture, {EMBEDDING: top[EMBEDDING]}, tensor_parallel)


def _ends(architecture: Architecture, tensor_parallel: int, stage: Stage) -> dict[str, int]:
    """What a stage holds beside its layers, by Megatron's names."""
    table = table_elements(architecture, tensor_parallel)
    found = {}
    if stage.is_first:
        found[EMBEDDING] = table
    if stage.is_last:
        found[FINAL_NORM] = architecture.hidden
        # With tied embeddings, another last stage keeps a copy of the first one's to multiply with.
        if not architecture.is_tied or not stage.is_first:
            found[OUTPUT] = table
    return found


def _elements(
    architecture: Architecture, table: Table, tensor_parallel: int, kv_heads: int | None = None
) -> int:
    sizes = _rank_sizes(architecture, tensor_parallel, kv_heads)
    shapes = [shape for parameter in table.values() for shape in parameter.tensors.values()]
    return sum(prod(sizes[dim] for dim in shape) for shape in shapes)


@lru_cache(maxsize=256)
def _rank_sizes(
    architecture: Architecture, tensor_parallel: int, kv_heads: int | None
) -> dict[Dim, int]:
    """Of the dimensions of families.py on one rank; every matrix has one that is split."""
    size = architecture
    kv_heads = size.kv_heads // tensor_parallel if kv_heads is None else kv_heads
    return {
        "hidden": size.hidden,
        "query": size.heads * size.head_dim // tensor_parallel,
        "key_value": kv_heads * size.head_dim,
        "head": size.head_dim,
        "ffn": size.ffn // tensor_parallel,
        "vocab": size.padded_vocab(tensor_parallel) // tensor_parallel,
    }
