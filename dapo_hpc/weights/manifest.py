"""What a published version consists of, and the check that a directory holds exactly that.

Needs no torch: tensors are read as bytes from the safetensors files.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dapo_hpc.records import PolicyVersion
from dapo_hpc.run_dir import write_json

MANIFEST = "manifest.json"
HEADER_LENGTH_BYTES = 8
"""A safetensors file starts with the length of its JSON header, little-endian."""
MAX_HEADER_BYTES = 100 * 2**20
"""Source: the safetensors format."""


class WeightMismatch(RuntimeError):
    """A weights directory is not what its manifest says; do not load it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a version."""

    file: str
    dtype: str
    """safetensors' name: F32, BF16."""
    shape: list[int]
    sha256: str
    """Hex digest of its bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A fixed sequence and what the learner makes of it: after a load the engine must agree."""

    token_ids: list[int]
    logprobs: list[float]
    """Nats, at temperature 1; logprobs[i] is that of token_ids[i + 1] after those before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """The contents of one published version."""

    version: PolicyVersion
    tensors: dict[str, TensorEntry]
    """By Hugging Face name."""
    probes: list[Probe]

    def save(self, directory: Path) -> None:
        """Write `manifest.json`, durably."""
        write_json(directory / MANIFEST, asdict(self))

    @classmethod
    def load(cls, directory: Path) -> WeightManifest:
        """Read `manifest.json`. Raises WeightMismatch when it is missing or damaged."""
        try:
            table = json.loads((directory / MANIFEST).read_text())
            return cls(
                version=PolicyVersion(**table["version"]),
                tensors={name: TensorEntry(**item) for name, item in table["tensors"].items()},
                probes=[Probe(**item) for item in table["probes"]],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightMismatch(
                f"{directory / MANIFEST} cannot be read ({type(error).__name__}: {error})."
            ) from None


def verify(directory: Path) -> WeightManifest:
    """The manifest, after every tensor's shape, type and digest was compared with it.

    Raises:
        WeightMismatch: names how many tensors differ and the first of them.
    """
    manifest = WeightManifest.load(directory)
    by_file: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in manifest.tensors.items():
        by_file.setdefault(entry.file, {})[name] = entry
    problems: list[str] = []
    for file, expected in by_file.items():
        problems += _differences(directory / file, expected)
    if problems:
        raise WeightMismatch(
            f"weights {manifest.version.name}: {len(problems)} of {len(manifest.tensors)} tensors "
            f"differ from the manifest (first: {problems[0]}). The files in {directory} changed "
            "after they were published, or are not completely visible on this node yet."
        )
    return manifest


def describe_file(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of a safetensors file, as it lies on disk."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        header, start = _header(content)
        return {
            name: TensorEntry(
                file=path.name,
                dtype=item["dtype"],
                shape=item["shape"],
                sha256=_digest(content, start, item["data_offsets"]),
            )
            for name, item in header.items()
        }


def _header(content: mmap.mmap) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(content[:HEADER_LENGTH_BYTES], "little")
    start = HEADER_LENGTH_BYTES + length
    if length > MAX_HEADER_BYTES or start > len(content):
        raise ValueError(f"a header of {length} bytes does not fit a file of {len(content)}")
    header = json.loads(content[HEADER_LENGTH_BYTES:start])
    header.pop("__metadata__", None)
    return header, start


def _digest(content: mmap.mmap, start: int, offsets: list[int]) -> str:
    with memoryview(content) as view, view[start + offsets[0] : start + offsets[1]] as data:
        if len(data) != offsets[1] - offsets[0]:
            raise ValueError("the file is shorter than its header says")
        return hashlib.sha256(data).hexdigest()


def _differences(path: Path, expected: dict[str, TensorEntry]) -> list[str]:
    try:
        found = describe_file(path)
    except (OSError, ValueError, KeyError) as error:
        return [f"{name}: {path.name} cannot be read, {error}" for name in expected]
    return [
        f"{name}, {_difference(found.get(name), entry)}"
        for name, entry in expected.items()
        if found.get(name) != entry
    ]


def _difference(found: TensorEntry | None, expected: TensorEntry) -> str:
    if found is None:
        return "missing"
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return f"{found.dtype} {found.shape} != {expected.dtype} {expected.shape}"
    return "other bytes"
