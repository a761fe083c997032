"""Where weights come from: the safetensors of a Hugging Face directory, or a random draw."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dapo_hpc.weights import names
from dapo_hpc.weights.directory import DTYPES, INDEX
from dapo_hpc.weights.families import EMBEDDING, OUTPUT
from dapo_hpc.weights.names import Index, ModelShape

SINGLE = "model.safetensors"
OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")
BUFFERS = ".rotary_emb.inv_freq"
"""Ending of tensors that old files hold and that follow from the config."""
COMPARED_ROWS = 4096
"""Rows of two large tensors that are compared at a time."""


class TensorSource(Protocol):
    """Hugging Face tensors by name, whole or in part."""

    def check(self, shape: ModelShape) -> None:
        """Raise ValueError unless this is exactly a model of `shape`; reads no weights."""

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """A tensor, or the part of it at `index`."""


class SafetensorsSource:
    """The safetensors files of a Hugging Face directory. Only what is asked for is read."""

    def __init__(self, directory: Path) -> None:
        """Open every file and read its header.

        Raises:
            ValueError: there are none, one is damaged, or the index names one that is not there.
        """
        self._directory = directory
        self._files: dict[str, Any] = {}
        self.bytes_read = 0
        """By `read`, since this was opened."""
        for path in _files(directory):
            file = _open(path)
            self._files |= dict.fromkeys(file.keys(), file)

    def check(self, shape: ModelShape) -> None:
        """Raise ValueError naming tensors that are missing, too many, or of another shape or type.

        Looks at the headers of the files alone.
        """
        expected = names.hf_shapes(shape)
        self._require_floats(expected)
        found = {name: self._shape(name) for name in self._files if not name.endswith(BUFFERS)}
        if shape.is_tied:
            self._drop_tied_output(shape, found)
        missing = [name for name in expected if name not in found]
        extra = [f"{name} {list(found[name])}" for name in found if name not in expected]
        other = [
            f"{name} {list(found[name])} instead of {list(size)}"
            for name, size in expected.items()
            if found.get(name, size) != size
        ]
        problems = [
            _listed("missing", missing),
            _listed("not part of that model", extra),
            _listed("of another shape", other),
        ]
        if any(problems):
            raise ValueError(
                f"{self._directory} is not the model that its config.json describes: "
                f"{'; '.join(filter(None, problems))}. Copy the directory again; if it is "
                "complete, its config.json belongs to another model."
            )

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """A tensor of the files, or the part of it at `index`: a view that is read when used."""
        if name not in self._files:
            raise ValueError(f"{self._directory} has no tensor {name}.")
        tensor: Tensor = self._files[name].get_slice(name)[index or (slice(None),)]
        self.bytes_read += tensor.nbytes
        return tensor

    def dtypes(self) -> set[str]:
        """safetensors' names of the types that occur: F32, BF16, ..."""
        return {
            str(file.get_slice(name).get_dtype())
            for name, file in self._files.items()
            if not name.endswith(BUFFERS)
        }

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def _require_floats(self, expected: Iterable[str]) -> None:
        for name in expected:
            dtype = name in self._files and self._files[name].get_slice(name).get_dtype()
            if dtype and dtype not in DTYPES.values():
                raise ValueError(
                    f"{self._directory}: {name} is of type {dtype}; expected one of "
                    f"{', '.join(DTYPES.values())}. Save the model in one of these."
                )

    def _drop_tied_output(self, shape: ModelShape, found: dict[str, tuple[int, ...]]) -> None:
        """Forget an output layer that repeats the embedding; transformers uses one that does not.

        Raises ValueError when it does not.
        """
        (embedding,), (output,) = (shape.tables.top[name].tensors for name in (EMBEDDING, OUTPUT))
        if output not in found or embedding not in found:
            return
        if found[output] != found[embedding] or not self._are_equal(output, embedding):
            raise ValueError(
                f"{self._directory}: {output} differs from {embedding}, but config.json says "
                "tie_word_embeddings. Set it to false if the output layer is the model's own, or "
                f"delete {output} from the files."
            )
        del found[output]

    def _are_equal(self, first: str, second: str) -> bool:
        one, other = (self._files[name].get_slice(name) for name in (first, second))
        starts = range(0, one.get_shape()[0], COMPARED_ROWS)
        parts = (slice(start, start + COMPARED_ROWS) for start in starts)
        return all(torch.equal(one[part], other[part]) for part in parts)


class RandomSource:
    """Freshly drawn weights: normal with the config's initializer_range, norms 1, biases 0.

    Each tensor depends on (seed, name) only, so every parallel layout starts from the same model.
    """

    def __init__(self, shape: ModelShape, scale: float, seed: int) -> None:
        self._sizes, self._scale, self._seed = names.hf_shapes(shape), scale, seed

    def check(self, shape: ModelShape) -> None:
        """Nothing to look at: the weights are drawn in the shape of the model."""

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """A tensor, or the part of it at `index`; the whole is drawn in either case."""
        tensor = self._draw(name)
        return tensor[index] if index else tensor

    def _draw(self, name: str) -> Tensor:
        sizes = self._sizes[name]
        if name.endswith("bias"):
            return torch.zeros(sizes)
        if len(sizes) == 1:
            return torch.ones(sizes)
        digest = int.from_bytes(f"{self._seed}/{name}".encode(), "little") % (2**61 - 1)
        return torch.randn(sizes, generator=torch.Generator().manual_seed(digest)) * self._scale


def _files(directory: Path) -> list[Path]:
    """The files of a model: those of its index, else model.safetensors, else all there are."""
    if (directory / INDEX).exists():
        return _indexed(directory / INDEX)
    single = directory / SINGLE
    found = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
    if found:
        return found
    others = sorted(path.name for kind in OTHER_FORMATS for path in directory.glob(kind))
    if not others:
        raise ValueError(f"{directory} holds no safetensors files; expected a model.")
    raise ValueError(
        f"{directory} holds {others[0]} but no safetensors files, and only those are read. Convert "
        "it once with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
    )


def _indexed(index: Path) -> list[Path]:
    try:
        listed = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{index} cannot be read ({type(error).__name__}: {error}). Copy it again."
        ) from None
    missing = [name for name in listed if not (index.parent / name).exists()]
    if missing:
        raise ValueError(
            f"{index} names {len(listed)} files, {_listed('not there', missing)}. "
            "Copy the directory again."
        )
    return [index.parent / name for name in listed]


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or cut off at {path.stat().st_size} bytes ({error}). Copy it again."
        ) from None


def _listed(what: str, items: Iterable[str]) -> str:
    """'3 missing (first: a)'; empty for none."""
    found = list(items)
    return f"{len(found)} {what} (first: {found[0]})" if found else ""
