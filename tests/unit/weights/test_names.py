"""Hugging Face <-> Megatron: nothing is lost, moved or repeated on the way there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import torch
from torch import Tensor

from dapo_hpc.weights import names
from dapo_hpc.weights.names import Entry, ModelShape
from tests.learner_parts import make_model

FAMILIES = [("qwen2", False), ("qwen2", True), ("qwen3", True), ("llama", False)]


def weights(model: Any, shape: ModelShape) -> dict[str, Tensor]:
    """What Hugging Face stores: a tied output layer is not in the file."""
    state = dict(model.state_dict())
    if shape.is_tied:
        del state["lm_head.weight"]
    return state


def shard(entry: Entry, stored: dict[str, Tensor], shape: ModelShape, tp: int, rank: int) -> Tensor:
    """A rank's parameter from the parts it reads."""
    wanted = zip(entry.hf_names, names.slices(entry, shape, tp, rank), strict=True)
    return names.join(entry, [stored[name][index] for name, index in wanted], shape, tp)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_shards_of_every_rank_merge_to_the_same_bits(
    family: str, tied: bool, stages: int, tp: int, tmp_path: Path
) -> None:
    model = make_model(tmp_path, family, tied=tied)
    shape = ModelShape.of(model.config)
    expected = weights(model, shape)
    found: dict[str, Tensor] = {}
    per_stage = shape.num_layers // stages
    for first in range(0, shape.num_layers, per_stage):
        for name in names.megatron_names(shape, first, per_stage):
            entry = names.entry(shape, name, first_layer=first)
            shards = [shard(entry, expected, shape, tp, rank) for rank in range(tp)]
            assert {tuple(s.shape) for s in shards} == {names.local_shape(entry, shape, tp)}
            merged = names.merge(entry.kind, shards, shape)
            assert not set(entry.hf_names) & set(found), "a tensor appears twice"
            found |= dict(zip(entry.hf_names, merged, strict=True))
    assert found.keys() == expected.keys()
    assert names.hf_shapes(shape) == {name: tuple(found[name].shape) for name in found}
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_shards_in_the_wrong_order_are_not_the_same(tmp_path: Path) -> None:
    """Negative control for the equality above."""
    model = make_model(tmp_path)
    shape = ModelShape.of(model.config)
    expected = weights(model, shape)
    for name in ("self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"):
        entry = names.entry(shape, f"decoder.layers.0.{name}")
        shards = [shard(entry, expected, shape, 2, rank) for rank in (1, 0)]
        merged = names.merge(entry.kind, shards, shape)
        assert not any(
            torch.equal(a, expected[b]) for a, b in zip(merged, entry.hf_names, strict=True)
        )


@pytest.mark.parametrize(
    ("tp", "rows"),
    [
        (2, 17),  # one row of padding
        (8, 5),  # the last rank holds padding only, and the one before it a part
    ],
)
def test_vocabulary_is_padded_with_zeros_and_stripped(tp: int, rows: int, tmp_path: Path) -> None:
    shape = ModelShape.of(make_model(tmp_path).config)
    entry = names.entry(shape, "embedding.word_embeddings.weight")
    full = torch.randn(shape.vocab, shape.hidden)
    shards = [
        shard(entry, {"model.embed_tokens.weight": full}, shape, tp, rank) for rank in range(tp)
    ]
    assert [len(shard) for shard in shards] == [rows] * tp
    assert not torch.cat(shards)[shape.vocab :].any()
    assert torch.equal(names.merge("vocab", shards, shape)[0], full)


def test_the_output_layer_of_a_tied_model_is_the_embedding(tmp_path: Path) -> None:
    for tied, expected in ((True, "model.embed_tokens.weight"), (False, "lm_head.weight")):
        shape = ModelShape.of(make_model(tmp_path / str(tied), tied=tied).config)
        assert names.entry(shape, "output_layer.weight").hf_names == (expected,)


def test_pieces_split_heads_and_feed_forward_evenly(tmp_path: Path) -> None:
    shape = ModelShape.of(make_model(tmp_path).config)  # 4 heads, 2 key-value heads, 48
    assert [names.max_pieces(shape, limit) for limit in (1, 2, 8)] == [1, 2, 2]


def test_an_unknown_parameter_is_named(tmp_path: Path) -> None:
    shape = ModelShape.of(make_model(tmp_path).config)
    with pytest.raises(ValueError, match=r"decoder\.layers\.0\.mlp\.router\.weight"):
        names.entry(shape, "decoder.layers.0.mlp.router.weight")
