"""A published version is whole, verifiable, loadable, and retired only when nobody holds it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

import torch
from safetensors.torch import load_file

from dapo_hpc.records import PolicyVersion
from dapo_hpc.weights import publish
from dapo_hpc.weights.manifest import Probe, WeightManifest, WeightMismatch, verify

VERSION = PolicyVersion(step=3, lineage=1)
PROBES = [Probe(token_ids=[1, 2, 3], logprobs=[-0.5, -1.25])]
ONE_FILE = 2**30


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model directory with companions, and with old weights that must not be copied."""
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "qwen2"}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"old")
    (directory / "pytorch_model.bin").write_bytes(b"old")
    return directory


def tensors() -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    yield "a", torch.randn(5, 7, generator=generator)
    yield "b", torch.randn(7, 3, generator=generator).t()  # not contiguous
    yield "c", torch.randn(4, generator=generator).bfloat16()


def put(tmp_path: Path, source: Path, shard_bytes: int = ONE_FILE) -> Path:
    weights = tmp_path / "weights"
    return publish.publish(weights, VERSION, tensors(), PROBES, source, shard_bytes)


def test_what_is_published_verifies_and_has_the_same_bits(tmp_path: Path, source: Path) -> None:
    directory = put(tmp_path, source)
    manifest = verify(directory)
    assert (manifest.version, manifest.probes) == (VERSION, PROBES)
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    loaded = load_file(directory / "model.safetensors")
    for name, value in tensors():
        assert torch.equal(loaded[name], value)
    assert (tmp_path / "weights" / "LATEST").read_text() == "v000003-l001\n"
    assert manifest.tensors["b"].shape == [3, 7]
    assert manifest.tensors["c"].dtype == "BF16"


def test_large_models_are_split_over_files_with_an_index(tmp_path: Path, source: Path) -> None:
    directory = put(tmp_path, source, shard_bytes=100)
    verify(directory)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * 5 * 7 + 4 * 7 * 3 + 2 * 4}, "no headers"
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_names_the_type_that_was_written(key: str, tmp_path: Path, source: Path) -> None:
    """transformers rounds what it loads to that type: here it would lose half of the bits."""
    (source / "config.json").write_text(json.dumps({"model_type": "qwen2", key: "bfloat16"}))
    written = {"float32": torch.ones(2), "bfloat16": torch.ones(2).bfloat16()}
    for dtype, tensor in written.items():
        publish.write_model(tmp_path / dtype, iter([("a", tensor)]), source, ONE_FILE)
        config = json.loads((tmp_path / dtype / "config.json").read_text())
        assert config == {"model_type": "qwen2", key: dtype}


def test_every_damage_is_a_mismatch(tmp_path: Path, source: Path) -> None:
    directory = put(tmp_path, source)
    path = directory / "model.safetensors"
    intact = path.read_bytes()
    for position in (3, len(intact) // 2, len(intact) - 1):  # header length, data, last byte
        damaged = bytearray(intact)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(WeightMismatch, match="3 tensors"):
            verify(directory)
    for shorter in (intact[:-1], intact[:5], b""):
        path.write_bytes(shorter)
        with pytest.raises(WeightMismatch):
            verify(directory)
    path.write_bytes(intact)
    verify(directory)
    (directory / "manifest.json").write_text("{")
    with pytest.raises(WeightMismatch, match=r"manifest\.json"):
        verify(directory)


def test_another_shape_is_told_in_the_message(tmp_path: Path, source: Path) -> None:
    directory = put(tmp_path, source)
    manifest = WeightManifest.load(directory)
    manifest.tensors["a"].shape.reverse()
    manifest.save(directory)
    with pytest.raises(WeightMismatch, match=r"1 of 3 .*a, F32 \[5, 7\] != F32 \[7, 5\]"):
        verify(directory)


def test_publishing_again_replaces_and_a_crash_leaves_nothing_visible(
    tmp_path: Path, source: Path
) -> None:
    directory = put(tmp_path, source)

    def crashing() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(3)
        raise KeyboardInterrupt

    later = PolicyVersion(step=4, lineage=1)
    with pytest.raises(KeyboardInterrupt):
        publish.publish(directory.parent, later, crashing(), PROBES, source, 1)
    assert not (directory.parent / later.name).exists()
    assert (directory.parent / "LATEST").read_text() == "v000003-l001\n"

    one = iter([("only", torch.ones(2))])
    publish.publish(directory.parent, VERSION, one, PROBES, source, ONE_FILE)
    assert list(verify(directory).tensors) == ["only"]


def test_old_versions_go_unless_in_use(tmp_path: Path, source: Path) -> None:
    weights = tmp_path / "weights"
    versions = [
        (1, 1),
        (9, 1),
        (2, 2),
        (3, 2),
        (4, 2),
    ]
    for step, lineage in versions:
        version = PolicyVersion(step=step, lineage=lineage)
        publish.publish(weights, version, tensors(), PROBES, source, ONE_FILE)
    (weights / ".tmp-v000005-l002").mkdir()
    deleted = publish.retire(weights, keep=2, in_use={"v000001-l001"})
    assert deleted == ["v000009-l001", "v000002-l002"]
    left = sorted(path.name for path in weights.iterdir() if path.is_dir())
    assert left == ["v000001-l001", "v000003-l002", "v000004-l002"]
