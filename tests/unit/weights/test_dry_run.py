"""Every rank of the large models is built without memory, and holds what it will load."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
import transformers

from dapo_hpc.config import load
from dapo_hpc.learner.meta_model import RankModel, as_rank, build_on_meta, dry_run
from dapo_hpc.learner.parallel import Layout
from dapo_hpc.weights import families
from dapo_hpc.weights.families import FAMILIES, Parameter
from dapo_hpc.weights.names import ModelShape

ROOT = Path(__file__).resolve().parents[3]

QWEN_32B = {
    "vocab_size": 152064,
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
QWEN_7B = QWEN_32B | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
pytestmark = pytest.mark.usefixtures("alone")


def ranks(sizes: dict[str, Any], layout: Layout, **more: Any) -> list[RankModel]:
    return dry_run(transformers.Qwen2Config(**sizes | more), layout, dtype=torch.bfloat16)


def at(found: list[RankModel], tensor: int, pipeline: int) -> RankModel:
    (rank,) = (r for r in found if (r.tensor_rank, r.pipeline_rank) == (tensor, pipeline))
    return rank


def num_parameters(sizes: dict[str, Any]) -> int:
    """Of an untied Qwen2, counted by hand."""
    hidden, ffn = sizes["hidden_size"], sizes["intermediate_size"]
    head = hidden // sizes["num_attention_heads"]
    fused = hidden + 2 * sizes["num_key_value_heads"] * head
    attention = (hidden + 1) * fused + hidden * hidden
    layer = attention + 3 * hidden * ffn + 2 * hidden
    return 2 * sizes["vocab_size"] * hidden + sizes["num_hidden_layers"] * layer + hidden


@pytest.mark.parametrize("sizes", [QWEN_32B, QWEN_7B], ids=["32B", "7B"])
def test_one_rank_holds_the_whole_model(sizes: dict[str, Any]) -> None:
    (only,) = ranks(sizes, Layout())
    assert only.num_parameters == num_parameters(sizes)


def test_every_rank_of_the_32b_model() -> None:
    """Shapes by hand, beside the comparison with names.py that the dry run makes itself."""
    found = ranks(QWEN_32B, Layout(tensor=8, pipeline=4))
    assert len(found) == 32
    for tensor in range(8):
        first, last = at(found, tensor, 0), at(found, tensor, 3)
        assert first.shapes["embedding.word_embeddings.weight"] == (19008, 5120)
        assert "output_layer.weight" not in first.shapes
        assert last.shapes["output_layer.weight"] == (19008, 5120)
        assert last.shapes["decoder.final_layernorm.weight"] == (5120,)
        assert "embedding.word_embeddings.weight" not in last.shapes
    assert [at(found, 0, stage).first_layer for stage in range(4)] == [0, 16, 32, 48]
    assert {
        name.removeprefix("decoder.layers.15."): shape
        for name, shape in at(found, 5, 2).shapes.items()
        if name.startswith("decoder.layers.15.")
    } == {
        "input_layernorm.weight": (5120,),
        "self_attention.linear_qkv.weight": (896, 5120),  # 5 query heads, 1 key, 1 value of 128
        "self_attention.linear_qkv.bias": (896,),
        "self_attention.linear_proj.weight": (5120, 640),
        "pre_mlp_layernorm.weight": (5120,),
        "mlp.linear_fc1.weight": (6912, 5120),  # 3456 rows of the gate, 3456 of the up projection
        "mlp.linear_fc2.weight": (5120, 3456),
    }
    assert "decoder.layers.16.input_layernorm.weight" not in at(found, 5, 2).shapes


@pytest.mark.parametrize(
    ("layout", "tied"),
    [
        (Layout(tensor=4, pipeline=2), False),
        (Layout(tensor=2, pipeline=2), True),  # the last stage has a copy of the embedding
        (Layout(pipeline=4), True),
        (Layout(tensor=4, pipeline=7, data=2), False),  # data-parallel ranks hold the same
    ],
)
def test_layouts_of_the_7b_model(layout: Layout, tied: bool) -> None:
    found = ranks(QWEN_7B, layout, tie_word_embeddings=tied)
    assert len(found) == layout.tensor * layout.pipeline
    last = at(found, 0, layout.pipeline - 1)
    assert last.shapes["output_layer.weight"] == (152064 // layout.tensor, 3584)


@pytest.mark.parametrize(
    ("name", "sizes"), [("qwen2.5_32b_dapo", QWEN_32B), ("qwen2.5_7b_dapo", QWEN_7B)]
)
def test_the_shipped_configs_in_their_own_layouts(name: str, sizes: dict[str, Any]) -> None:
    config = load(ROOT / "configs" / f"{name}.toml", [])
    learner = config.learner
    layout = Layout(learner.tensor_parallel, learner.pipeline_parallel, learner.data_parallel)
    hf = families.read_config(ROOT / "configs" / config.model.path)
    assert {key: getattr(hf, key) for key in sizes} == sizes
    found = dry_run(hf, layout, dtype=torch.bfloat16)
    split = sum(rank.num_parameters for rank in found)
    # Norms are whole on every tensor-parallel rank: two in each layer, and the last one.
    norms = (2 * sizes["num_hidden_layers"] + 1) * sizes["hidden_size"]
    assert split == num_parameters(sizes) + norms * (layout.tensor - 1)


def test_nothing_is_allocated() -> None:
    config = transformers.Qwen2Config(**QWEN_32B)
    with as_rank(Layout(), 0) as here:
        module = build_on_meta(config, ModelShape.of(config), here, torch.bfloat16)
    assert all(p.is_meta for p in module.parameters())


def test_a_wrong_table_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a family whose last matrix lies the wrong way round."""
    name = "mlp.linear_fc2.weight"
    turned = Parameter("row", {"mlp.down_proj.weight": ("ffn", "hidden")})
    wrong = replace(FAMILIES["qwen2"], layer={**FAMILIES["qwen2"].layer, name: turned})
    monkeypatch.setitem(FAMILIES, "qwen2", wrong)
    with pytest.raises(AssertionError, match=re.escape(f"{name} and 27 more: (18944, 3584)")):
        ranks(QWEN_7B, Layout())


@pytest.mark.parametrize(
    ("layout", "what"),
    [
        (Layout(tensor=8), "num_key_value_heads = 4"),
        (Layout(pipeline=5), "28 layers"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(layout: Layout, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        ranks(QWEN_7B, layout)
