"""Hugging Face <-> Megatron: nothing is lost, moved or repeated on the way there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import torch

from dapo_hpc.weights import names
from dapo_hpc.weights.names import ModelShape
from tests.learner_parts import make_model

FAMILIES = [("qwen2", False), ("qwen2", True), ("qwen3", True), ("llama", False)]


def weights(model: Any, shape: ModelShape) -> dict[str, Any]:
    """What Hugging Face stores: a tied output layer is not in the file."""
    state = dict(model.state_dict())
    if shape.is_tied:
        del state[names.OUTPUT]
    return state


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_shards_of_every_rank_merge_to_the_same_bits(
    family: str, tied: bool, stages: int, tp: int, tmp_path: Path
) -> None:
    model = make_model(tmp_path, family, tied=tied)
    shape = ModelShape.of(model.config)
    expected = weights(model, shape)
    found: dict[str, Any] = {}
    per_stage = shape.num_layers // stages
    for first in range(0, shape.num_layers, per_stage):
        for name in names.megatron_names(shape, first, per_stage):
            entry = names.entry(name, first_layer=first, is_tied=tied)
            tensors = [expected[hf_name] for hf_name in entry.hf_names]
            shards = [names.shard(entry.kind, tensors, shape, tp, rank) for rank in range(tp)]
            merged = names.merge(entry.kind, shards, shape)
            assert not set(entry.hf_names) & set(found), "a tensor appears twice"
            found |= dict(zip(entry.hf_names, merged, strict=True))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert names.hf_shape(name, shape) == tuple(value.shape)


def test_shards_in_the_wrong_order_are_not_the_same(tmp_path: Path) -> None:
    """Negative control for the equality above."""
    model = make_model(tmp_path)
    shape = ModelShape.of(model.config)
    expected = weights(model, shape)
    for name in ("self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"):
        entry = names.entry(f"decoder.layers.0.{name}", first_layer=0, is_tied=False)
        tensors = [expected[hf_name] for hf_name in entry.hf_names]
        shards = [names.shard(entry.kind, tensors, shape, 2, rank) for rank in (1, 0)]
        merged = names.merge(entry.kind, shards, shape)
        assert not any(torch.equal(a, b) for a, b in zip(merged, tensors, strict=True))


def test_vocabulary_is_padded_with_zeros_and_stripped(tmp_path: Path) -> None:
    shape = ModelShape.of(make_model(tmp_path).config)
    full = torch.randn(shape.vocab, shape.hidden)
    shards = [names.shard("vocab", [full], shape, 2, rank) for rank in (0, 1)]
    assert [len(shard) for shard in shards] == [17, 17]  # 33 rows and one of padding
    assert not shards[1][-1].any()
    assert torch.equal(names.merge("vocab", shards, shape)[0], full)


def test_an_unknown_parameter_is_named() -> None:
    with pytest.raises(ValueError, match=r"decoder\.layers\.0\.mlp\.router\.weight"):
        names.entry("decoder.layers.0.mlp.router.weight", first_layer=0, is_tied=False)
