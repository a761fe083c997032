"""`dapo import` and `dapo export`: Hugging Face directories to checkpoints and back.

One process without a GPU, one parameter after the other: neither direction holds the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dapo_hpc.config import load
from dapo_hpc.learner.checkpoint_files import FILES, damage, directory_of, settle, steps_in
from dapo_hpc.learner.checkpoint_state import sharded_state
from dapo_hpc.learner.meta_model import as_rank, build_on_meta
from dapo_hpc.learner.parallel import Layout
from dapo_hpc.learner.sharded_files import INDEX_FILE, ShardedReader, Writing, write_sharded
from dapo_hpc.run_dir import RunDir, write_json
from dapo_hpc.weights import directory, families, names
from dapo_hpc.weights.directory import Spec
from dapo_hpc.weights.families import CONFIG
from dapo_hpc.weights.names import LAYERS, ModelShape
from dapo_hpc.weights.source import SafetensorsSource

MAX_PIECES = 8
"""Into how many pieces an imported matrix is cut: a learner whose tensor_parallel divides them
reads whole pieces and nothing else. The widest tensor parallelism within a node."""
SHARD_BYTES = 4 * 2**30
"""Size of one safetensors file of an export."""
DIGEST_THREADS = 8
"""Files that are compared with their digests at a time."""


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written."""

    target: Path
    num_tensors: int
    num_bytes: int
    dtypes: str

    def __str__(self) -> str:
        return (
            f"{self.num_tensors} tensors, {self.num_bytes / 2**30:.2f} GiB of {self.dtypes}: "
            f"{self.target}"
        )


def export_checkpoint(
    source: Path, target: Path, *, step: int | None = None, model: Path | None = None
) -> Converted:
    """Write a checkpoint's weights as a Hugging Face directory.

    Args:
        source: run directory, or one checkpoint.
        target: directory to write; must not exist.
        step: which checkpoint of a run; None: the newest.
        model: where config and tokenizer come from; None: the model of the run.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or it is of another model.
    """
    _require_free(target)
    checkpoint = _find_checkpoint(source, step)
    companions = model or _find_model(checkpoint)
    hf = _supported_config(companions)
    _require_intact(checkpoint)
    shape = ModelShape.of(hf)
    with as_rank(Layout(), 0) as here:
        state = sharded_state(build_on_meta(hf, shape, here, torch.float32))
    reader = ShardedReader(checkpoint)
    specs = {
        hf_name: Spec(size, reader.dtype(state[name]))
        for name in names.megatron_names(shape, 0, shape.num_layers)
        for hf_name, size in names.entry(shape, name).hf_shapes.items()
    }
    tensors = _exported(reader, state, shape)
    directory.write_streaming(target, specs, tensors, companions, SHARD_BYTES)
    return _converted(target, specs)


def import_model(source: Path, target: Path, *, dtype: torch.dtype | None = None) -> Converted:
    """Write a Hugging Face model as a checkpoint of weights alone, its config and tokenizer beside.

    Args:
        source: Hugging Face directory.
        target: directory to write; must not exist.
        dtype: of the checkpoint's numbers; None: as they are.

    Raises:
        ValueError: the directory is damaged, or not a model that the learner computes.
    """
    _require_free(target)
    hf = _supported_config(source)
    shape = ModelShape.of(hf)
    tensors = SafetensorsSource(source)
    tensors.check(shape)
    dtype = dtype or _only_dtype(tensors, source)
    temporary = directory.fresh(target.with_name(f"{directory.TEMPORARY}{target.name}"))
    directory.copy_companions(source, temporary, {dtype})
    groups = _layers_of_every_rank(hf, shape, tensors, dtype)
    write_sharded(temporary, groups, {"content_metadata": {}})
    files = sorted(temporary.iterdir())
    write_json(temporary / FILES, {path.name: settle(path) for path in files})
    directory.replace(temporary, target)
    return _converted(
        target, {name: Spec(size, dtype) for name, size in names.hf_shapes(shape).items()}
    )


def use_one_thread() -> None:
    """Conversion copies memory and writes files: more threads only wait for each other."""
    torch.set_num_threads(1)


# ------------------------------------------------------------------ the weights


def _exported(
    reader: ShardedReader, state: dict[str, Any], shape: ModelShape
) -> Iterator[tuple[str, Tensor]]:
    for name in names.megatron_names(shape, 0, shape.num_layers):
        entry = names.entry(shape, name)
        tensors = names.merge(entry.kind, [reader.read(state[name])], shape)
        yield from zip(entry.hf_names, tensors, strict=True)


def _layers_of_every_rank(
    hf: Any, shape: ModelShape, source: SafetensorsSource, dtype: torch.dtype
) -> list[list[Writing]]:
    """What as many tensor-parallel ranks as there are pieces would write, layer by layer."""
    tp = names.max_pieces(shape, MAX_PIECES)
    groups: dict[str, list[Writing]] = {}
    for rank in range(tp):
        with as_rank(Layout(tp), rank) as here:
            state = sharded_state(build_on_meta(hf, shape, here, dtype))
        for name, sharded in state.items():
            make = _Part(source, shape, name, tp, rank)
            groups.setdefault(_group(name), []).append(Writing(sharded, dtype, make))
    return list(groups.values())


def _group(name: str) -> str:
    """The layer of a parameter; outside the layers its own name."""
    is_layer = name.startswith(LAYERS)
    return name.removeprefix(LAYERS).partition(".")[0] if is_layer else name


@dataclass(frozen=True, slots=True)
class _Part:
    """One rank's part of a parameter, from the Hugging Face tensors it is made of."""

    source: SafetensorsSource
    shape: ModelShape
    name: str
    tp: int
    rank: int

    def __call__(self) -> Tensor:
        entry = names.entry(self.shape, self.name)
        wanted = names.slices(entry, self.shape, self.tp, self.rank)
        parts = [
            self.source.read(name, index)
            for name, index in zip(entry.hf_names, wanted, strict=True)
        ]
        return names.join(entry, parts, self.shape, self.tp)


def _only_dtype(source: SafetensorsSource, path: Path) -> torch.dtype:
    found = source.dtypes()
    if len(found) != 1:
        raise ValueError(
            f"{path} holds tensors of several types ({', '.join(sorted(found))}), and a checkpoint "
            "has one. Choose it with --dtype."
        )
    return next(dtype for dtype, name in directory.DTYPES.items() if {name} == found)


def _converted(target: Path, specs: dict[str, Spec]) -> Converted:
    dtypes = sorted({str(spec.dtype).removeprefix("torch.") for spec in specs.values()})
    total = sum(spec.num_bytes for spec in specs.values())
    return Converted(target, len(specs), total, " and ".join(dtypes))


# ------------------------------------------------------------------ what is where


def _require_free(target: Path) -> None:
    if target.exists():
        raise ValueError(f"{target} exists already. Name another directory, or delete that one.")


def _supported_config(model: Path) -> Any:
    hf = families.read_config(model)
    found = families.problems(hf)
    if found:
        raise ValueError(f"{model / CONFIG}: the learner does not compute it: {'; '.join(found)}.")
    return hf


def _find_checkpoint(source: Path, step: int | None) -> Path:
    if (source / INDEX_FILE).exists():
        if step is not None:
            raise ValueError(f"--step chooses among the checkpoints of a run; {source} is one.")
        return source
    run = RunDir(source)
    if not run.config.exists():
        raise ValueError(
            f"{source} is neither a run directory (it holds no config.toml) nor a checkpoint (it "
            f"holds no {INDEX_FILE})."
        )
    # A run of `dapo sft` keeps its checkpoints one level deeper.
    sft = run.checkpoints / "sft"
    return _of_step(sft if sft.exists() else run.checkpoints, step)


def _of_step(checkpoints: Path, step: int | None) -> Path:
    """The checkpoint of a step, or the newest, which is the one the learner would resume from."""
    found = steps_in(checkpoints)
    if not found:
        raise ValueError(f"{checkpoints} holds no checkpoint yet.")
    chosen = found[-1] if step is None else step
    if chosen not in found:
        raise ValueError(
            f"{checkpoints} holds no checkpoint of step {chosen}; it holds those of steps "
            f"{', '.join(map(str, found))}."
        )
    return directory_of(checkpoints, chosen)


def _find_model(checkpoint: Path) -> Path:
    """The directory with a checkpoint's config and tokenizer."""
    if (checkpoint / CONFIG).exists():
        return checkpoint  # imported
    for parent in checkpoint.absolute().parents:
        run = RunDir(parent)
        if run.config.exists() and run.checkpoints in checkpoint.absolute().parents:
            config = load(run.config)
            is_sft = checkpoint.absolute().parent.name == "sft"
            return Path(config.sft.init if is_sft and config.sft else config.model.path)
    raise ValueError(
        f"{checkpoint} lies in no run directory, so nothing says where its config and tokenizer "
        "are. Name the directory of the model: --model DIR."
    )


def _require_intact(checkpoint: Path) -> None:
    """Raise ValueError when a file of a checkpoint is not what was written."""
    shares = DIGEST_THREADS
    with ThreadPoolExecutor(shares) as pool:
        found = pool.map(lambda share: damage(checkpoint, share, shares), range(shares))
    problem = next(filter(None, found), None)
    if problem:
        raise ValueError(
            f"the checkpoint {checkpoint} is damaged: {problem}. Choose another one with --step."
        )
