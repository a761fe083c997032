"""The learner's side of the weights: a version becomes a directory, whole or not at all."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dapo_hpc.records import PolicyVersion
from dapo_hpc.run_dir import write_json, write_text
from dapo_hpc.weights.directory import (
    DTYPES,
    INDEX,
    TEMPORARY,
    copy_companions,
    fresh,
    replace,
    shard_names,
    sync_files,
)
from dapo_hpc.weights.manifest import Probe, TensorEntry, WeightManifest

LATEST = "LATEST"

log = logging.getLogger(__name__)


def publish(
    weights_dir: Path,
    version: PolicyVersion,
    tensors: Iterator[tuple[str, Tensor]],
    probes: list[Probe],
    source_dir: Path,
    shard_bytes: int,
) -> Path:
    """Write `weights_dir/<version.name>` and point LATEST to it.

    The directory appears under its final name when it is complete and durable. Publishing a version
    again replaces it.

    Args:
        weights_dir: of the run.
        version: names the directory.
        tensors: Hugging Face name and full tensor; consumed one at a time.
        probes: for the manifest.
        source_dir: model whose config, tokenizer and generation config are copied along.
        shard_bytes: a file is closed when it has reached this size.
    """
    temporary = fresh(weights_dir / f"{TEMPORARY}{version.name}")
    entries = _write_model(temporary, tensors, source_dir, shard_bytes)
    WeightManifest(version=version, tensors=entries, probes=probes).save(temporary)
    final = weights_dir / version.name
    replace(temporary, final)
    write_text(weights_dir / LATEST, version.name + "\n")
    return final


def write_model(
    target: Path, tensors: Iterator[tuple[str, Tensor]], source_dir: Path, shard_bytes: int
) -> None:
    """Write a complete Hugging Face model to `target`, which appears whole. Arguments as above."""
    temporary = fresh(target.with_name(f"{TEMPORARY}{target.name}"))
    _write_model(temporary, tensors, source_dir, shard_bytes)
    replace(temporary, target)


def retire(weights_dir: Path, keep: int, in_use: set[str]) -> list[str]:
    """Delete all but the newest `keep` versions and those in use.

    Args:
        weights_dir: of the run.
        keep: how many of the newest remain whatever happens.
        in_use: names of versions that an actor holds or evaluates.

    Returns:
        Names of the deleted versions.
    """
    versions = [PolicyVersion.parse(path.name) for path in weights_dir.glob("v*-l*")]
    versions.sort(key=lambda version: (version.lineage, version.step))
    deleted = [v.name for v in versions[: max(0, len(versions) - keep)] if v.name not in in_use]
    for name in deleted:
        # Renamed first: an actor never sees half a version under its name.
        os.rename(weights_dir / name, weights_dir / f"{TEMPORARY}old-{name}")
    for left in weights_dir.glob(f"{TEMPORARY}*"):
        shutil.rmtree(left)
    return deleted


def _write_model(
    directory: Path, tensors: Iterator[tuple[str, Tensor]], source_dir: Path, shard_bytes: int
) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    shards: list[list[str]] = []
    dtypes: set[torch.dtype] = set()
    num_bytes = 0
    for shard in _shards(tensors, shard_bytes):
        path = directory / f"shard-{len(shards)}"
        save_file(shard, path, metadata={"format": "pt"})
        shards.append(list(shard))
        entries |= {name: _entry(tensor) for name, tensor in shard.items()}
        dtypes |= {tensor.dtype for tensor in shard.values()}
        num_bytes += sum(tensor.nbytes for tensor in shard.values())
    entries = _name_shards(directory, shards, entries, num_bytes)
    copy_companions(source_dir, directory, dtypes)
    sync_files(directory)
    return entries


def _shards(tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        shard[name] = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        size += tensor.numel() * tensor.element_size()
        if size >= shard_bytes:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def _entry(tensor: Tensor) -> TensorEntry:
    """Digest of the bytes in memory, so that a file damaged while it was written is found."""
    return TensorEntry(
        file="",
        dtype=DTYPES[tensor.dtype],
        shape=list(tensor.shape),
        sha256=hashlib.sha256(tensor.view(torch.uint8).numpy().data).hexdigest(),
    )


def _name_shards(
    directory: Path, shards: list[list[str]], entries: dict[str, TensorEntry], num_bytes: int
) -> dict[str, TensorEntry]:
    """Give the files their final names, which hold their number, and write the index.

    num_bytes: of all tensors, without the headers of the files; transformers counts so.
    """
    count = len(shards)
    files = shard_names(count)
    located: dict[str, TensorEntry] = {}
    for i, (file, names) in enumerate(zip(files, shards, strict=True)):
        os.rename(directory / f"shard-{i}", directory / file)
        for name in names:
            entry = entries[name]
            located[name] = TensorEntry(
                file=file, dtype=entry.dtype, shape=entry.shape, sha256=entry.sha256
            )
    if count > 1:
        index = {name: entry.file for name, entry in located.items()}
        write_json(directory / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": index})
    return located
