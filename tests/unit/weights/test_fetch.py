"""An actor never gets weights that are not exactly what the learner wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_hpc.records import PolicyVersion
from dapo_hpc.weights import fetch as fetch_module
from dapo_hpc.weights.fetch import fetch
from dapo_hpc.weights.manifest import Probe, WeightMismatch

torch = pytest.importorskip("torch", reason="needs torch")

VERSION = PolicyVersion(step=4, lineage=2)
PROBE = Probe(token_ids=[1, 2, 3], logprobs=[-0.5, -1.5])


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """weights/ with one version."""
    from dapo_hpc.weights.publish import publish

    monkeypatch.setattr(fetch_module, "SECOND_LOOK_S", 0.05)
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text("{}")
    weights = tmp_path / "weights"
    weights.mkdir()
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4)}
    publish(weights, VERSION, iter(tensors.items()), [PROBE], source, 2**20)
    return weights


def test_a_published_version_is_fetched_whole(published: Path) -> None:
    directory, manifest = fetch(published, VERSION)
    assert directory == published / "v000004-l002"
    assert manifest.version == VERSION
    assert manifest.probes == [PROBE]
    assert set(manifest.tensors) == {"a.weight", "b.weight"}


def test_one_changed_byte_is_found(published: Path) -> None:
    file = published / VERSION.name / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(WeightMismatch, match="1 of 2 tensors differ"):
        fetch(published, VERSION)


def test_a_second_look_is_taken_before_giving_up(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = published / VERSION.name / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    monkeypatch.setattr(fetch_module.time, "sleep", lambda _: file.write_bytes(content))
    assert fetch(published, VERSION)[1].version == VERSION


def test_another_versions_directory_under_this_name_is_refused(published: Path) -> None:
    other = PolicyVersion(step=5, lineage=2)
    (published / VERSION.name).rename(published / other.name)
    with pytest.raises(WeightMismatch, match="the manifest in .* is of v000004-l002"):
        fetch(published, other)


def test_a_version_that_was_never_there_is_another_kind_of_failure(published: Path) -> None:
    with pytest.raises(FileNotFoundError, match="never published, or deleted"):
        fetch(published, PolicyVersion(step=9, lineage=2))
