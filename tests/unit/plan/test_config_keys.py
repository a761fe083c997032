"""The keys of the learner at scale: bounds, cross-checks, and what is frozen."""

from __future__ import annotations

from typing import Any

import pytest

from dapo_hpc.config import ConfigProblems, Frozen, parse


def table(**sections: dict[str, Any]) -> dict[str, Any]:
    least: dict[str, Any] = {
        "run": {"name": "r", "total_steps": 100},
        "model": {"path": "m"},
        "prompts": {"train": "a.parquet", "eval": "b.parquet"},
    }
    return {**least, **sections}


def test_defaults_change_nothing() -> None:
    config = parse(table())
    learner, optimizer = config.learner, config.optimizer
    assert (learner.recompute, learner.distributed_optimizer) == ("none", False)
    assert (learner.context_parallel, learner.expert_parallel) == (1, 1)
    assert (learner.freeze, learner.async_checkpoint) == ((), False)
    assert (optimizer.schedule, optimizer.min_lr_frac) == ("constant", 0.0)


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("learner", {"recompute": "some"}, "learner.recompute = 'some'"),
        ("learner", {"expert_parallel": 3, "data_parallel": 4}, "3 does not divide"),
        ("learner", {"freeze": ["layers.5-2"]}, 'learner.freeze has "layers.5-2"; expected'),
        ("learner", {"freeze": ["embed"]}, "embedding, output_layer, final_norm, layers.N or"),
        ("optimizer", {"min_lr_frac": 0.1}, "min_lr_frac = 0.1 has no meaning while"),
        ("optimizer", {"schedule": "cosine", "min_lr_frac": 1.5}, "optimizer.min_lr_frac = 1.5"),
        ("optimizer", {"schedule": "linear", "warmup_steps": 100}, "nothing is left to fall over"),
        ("model", {"path": "m", "imported": "i"}, "would not be trained on"),
        ("optimizer", {"max_skipped_updates": 0}, "optimizer.max_skipped_updates = 0"),
        ("hardware", {"gpu_memory_gib": 0}, "hardware.gpu_memory_gib = 0"),
    ],
)
def test_what_makes_no_sense_is_a_problem(section: str, values: dict[str, Any], words: str) -> None:
    sft = {"init": "m", "pairs": "c.parquet"}
    with pytest.raises(ConfigProblems) as caught:
        parse(table(sft=sft, **{section: values}))
    assert words in str(caught.value)


def test_what_a_pattern_freezes() -> None:
    frozen = Frozen.of(["embedding", "layers.0-2", "layers.9"])
    names = {
        "embedding.word_embeddings.weight": True,
        "decoder.layers.0.mlp.linear_fc1.weight": True,
        "decoder.layers.2.input_layernorm.weight": True,
        "decoder.layers.3.input_layernorm.weight": False,
        "decoder.layers.9.self_attention.linear_qkv.bias": True,
        "decoder.layers.10.mlp.linear_fc2.weight": False,
        "decoder.final_layernorm.weight": False,
        "output_layer.weight": False,
    }
    for name, expected in names.items():
        assert frozen.holds(name, first_layer=0, is_tied=False) is expected, name


def test_layers_are_counted_over_all_stages() -> None:
    frozen = Frozen.of(["layers.8"])
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert frozen.holds(name, first_layer=8, is_tied=False)
    assert not frozen.holds(name, first_layer=0, is_tied=False)


def test_a_tied_output_layer_is_frozen_with_the_embedding() -> None:
    frozen = Frozen.of(["embedding"])
    assert frozen.holds("output_layer.weight", first_layer=4, is_tied=True)
    assert not frozen.holds("output_layer.weight", first_layer=4, is_tied=False)
    assert Frozen.of(["output_layer"]).problems(num_layers=4, is_tied=True)
    assert not Frozen.of(["output_layer"]).problems(num_layers=4, is_tied=False)


def test_a_model_that_would_not_train_is_a_problem() -> None:
    everything = ["embedding", "output_layer", "final_norm", "layers.0-3"]
    (problem,) = Frozen.of(everything).problems(num_layers=4, is_tied=False)
    assert "nothing would train" in problem
    assert Frozen.of(everything[1:]).problems(num_layers=4, is_tied=False) == []
