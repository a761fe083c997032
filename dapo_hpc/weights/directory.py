"""Hugging Face directories: how one is written, tensor by tensor, and how it appears whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dapo_hpc.run_dir import fsync_directory, write_json
from dapo_hpc.weights.families import CONFIG
from dapo_hpc.weights.manifest import HEADER_LENGTH_BYTES, MANIFEST

TEMPORARY = ".tmp-"
INDEX = "model.safetensors.index.json"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""safetensors' names for them."""
NOT_COPIED = (
    *(".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json"),
    ".distcp",
)
"""Endings of weights in other directories and formats."""
NOT_COMPANIONS = (MANIFEST, ".metadata", "metadata.json", "files.json")
"""Files of a published version or a checkpoint that say what its weights are."""
ALIGNMENT_BYTES = 8
"""Where the numbers of a safetensors file start. Source: the safetensors format."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What is known of a tensor before it is there."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def write_streaming(
    target: Path,
    specs: Mapping[str, Spec],
    tensors: Iterator[tuple[str, Tensor]],
    source_dir: Path,
    shard_bytes: int,
) -> None:
    """Write a complete Hugging Face model, holding one tensor at a time.

    Args:
        target: directory; appears whole, with its final name.
        specs: of every tensor, in the order of `tensors`.
        tensors: Hugging Face name and full tensor; consumed one at a time.
        source_dir: model whose config, tokenizer and generation config are copied along.
        shard_bytes: a file is closed when it has reached this size.

    Raises:
        ValueError: `tensors` brings something else than `specs` says; a bug of the caller.
    """
    temporary = fresh(target.with_name(f"{TEMPORARY}{target.name}"))
    shards = _plan(specs, shard_bytes)
    for file, names in shards.items():
        with (temporary / file).open("wb") as stream:
            stream.write(_header({name: specs[name] for name in names}))
            for name in names:
                _write(stream, name, specs[name], next(tensors, ("nothing", torch.empty(0))))
    if len(shards) > 1:
        located = {name: file for file, names in shards.items() for name in names}
        total = sum(spec.num_bytes for spec in specs.values())
        write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": located})
    copy_companions(source_dir, temporary, {spec.dtype for spec in specs.values()})
    sync_files(temporary)
    replace(temporary, target)


def shard_names(count: int) -> list[str]:
    """What the files of a model are called."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def fresh(path: Path) -> Path:
    """An empty directory."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def replace(temporary: Path, final: Path) -> None:
    """Give a finished directory its name; what had the name goes."""
    fsync_directory(temporary)
    if final.exists():
        old = fresh(final.with_name(f"{TEMPORARY}old-{final.name}"))
        os.rename(final, old)
        os.rename(temporary, final)
        shutil.rmtree(old)
    else:
        os.rename(temporary, final)
    fsync_directory(final.parent)


def copy_companions(source: Path, directory: Path, dtypes: Collection[torch.dtype]) -> None:
    """config.json, tokenizer, chat template, generation config: all files but weights.

    Where config.json names the type of the weights, it names the one that was written: transformers
    rounds what it loads to that type.
    """
    for path in sorted(source.iterdir()):
        is_weight = path.name.endswith(NOT_COPIED)
        if path.is_file() and not is_weight and path.name not in NOT_COMPANIONS:
            shutil.copyfile(path, directory / path.name)
    config = directory / CONFIG
    if len(dtypes) == 1 and config.exists():
        (dtype,) = dtypes
        _name_dtype(config, str(dtype).removeprefix("torch."))


def _name_dtype(config: Path, dtype: str) -> None:
    table = json.loads(config.read_text())
    wrong = [key for key in ("dtype", "torch_dtype") if table.get(key, dtype) != dtype]
    if wrong:
        write_json(config, table | dict.fromkeys(wrong, dtype))


def sync_files(directory: Path) -> None:
    """Make the contents of its files durable."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _plan(specs: Mapping[str, Spec], shard_bytes: int) -> dict[str, list[str]]:
    """File -> its tensors."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if size >= shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.num_bytes
    return dict(zip(shard_names(len(shards)), shards, strict=True))


def _header(specs: Mapping[str, Spec]) -> bytes:
    """The start of a safetensors file: length of the JSON, and the JSON, filled up with blanks."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.num_bytes
        offsets = [start, end]
        table[name] = {
            "dtype": DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    return len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text


def _write(stream: BinaryIO, name: str, spec: Spec, found: tuple[str, Tensor]) -> None:
    tensor = found[1].detach().to("cpu").contiguous()
    if (found[0], tuple(tensor.shape), tensor.dtype) != (name, spec.shape, spec.dtype):
        raise ValueError(
            f"{found[0]} came as {tensor.dtype} {list(tensor.shape)}; expected {name} as "
            f"{spec.dtype} {list(spec.shape)}."
        )
    stream.write(tensor.view(torch.uint8).numpy().data)
