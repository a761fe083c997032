"""Parameters of every rank, planned, against Megatron's own on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
import transformers
from safetensors.torch import load_file, save_file

from dapo_hpc.config import LearnerSection
from dapo_hpc.learner.meta_model import dry_run
from dapo_hpc.learner.parallel import Layout
from dapo_hpc.plan.architecture import Architecture
from dapo_hpc.plan.layout import layout_problems
from dapo_hpc.plan.parameters import model_elements, rank_parameters, stages
from tests.unit.plan.measuring import write_model

MODELS = Path(__file__).resolve().parents[3] / "configs" / "models"


def planned(size: Architecture, learner: LearnerSection) -> list[int]:
    return [rank_parameters(size, learner, stage).held for stage in stages(size, learner)]


def real(directory: Path, learner: LearnerSection) -> list[int]:
    """Of the first tensor-parallel rank of each stage."""
    hf = transformers.AutoConfig.from_pretrained(directory)
    layout = Layout(learner.tensor_parallel, learner.pipeline_parallel)
    ranks = dry_run(hf, layout, dtype=torch.bfloat16)
    found = {rank.pipeline_rank: rank.num_parameters for rank in ranks if rank.tensor_rank == 0}
    return [found[number] for number in sorted(found)]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_every_layout_of_a_small_model(family: str, tied: bool, tmp_path: Path) -> None:
    write_model(tmp_path, family, tie_word_embeddings=tied, vocab_size=501)
    size = Architecture.read(tmp_path)
    for tensor in (1, 2):
        for pipeline in (1, 2, 4):
            learner = LearnerSection(tensor_parallel=tensor, pipeline_parallel=pipeline)
            assert planned(size, learner) == real(tmp_path, learner), (tensor, pipeline)


@pytest.mark.usefixtures("alone")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tensor", "pipeline"), [("Qwen2.5-32B", 8, 2), ("Qwen2.5-7B", 4, 1)]
)
def test_shipped_layouts(name: str, tensor: int, pipeline: int) -> None:
    learner = LearnerSection(tensor_parallel=tensor, pipeline_parallel=pipeline)
    assert planned(Architecture.read(MODELS / name), learner) == real(MODELS / name, learner)


@pytest.mark.parametrize(
    ("name", "total"),
    [
        # Source: the sum over the safetensors that were published.
        ("Qwen2.5-32B", 32_763_876_352),
        ("Qwen2.5-7B", 7_615_616_512),
    ],
)
def test_shipped_architectures_have_the_published_number_of_parameters(
    name: str, total: int
) -> None:
    assert model_elements(Architecture.read(MODELS / name)) == total


def test_of_the_whole_model_as_transformers_saves_it(tmp_path: Path) -> None:
    """A tied output layer is not saved, padding is not there."""
    for tied in (False, True):
        write_model(tmp_path, "qwen3", tie_word_embeddings=tied, vocab_size=501)
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        assert model_elements(Architecture.read(tmp_path)) == sum(
            tensor.numel() for tensor in saved.values()
        )
        save_file({}, tmp_path / "model.safetensors")


@pytest.mark.usefixtures("alone")
def test_a_wrong_layer_count_is_noticed(tmp_path: Path) -> None:
    """Negative control."""
    size = Architecture.read(write_model(tmp_path))
    learner = LearnerSection()
    write_model(tmp_path, num_hidden_layers=5)
    assert planned(size, learner) != real(tmp_path, learner)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"model_type": "mixtral"},
            "model_type is mixtral; the learner trains qwen2, qwen3, llama",
        ),
        ({"hidden_size": None}, "hidden_size is None; expected a positive number"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "dynamic"}, "rope_parameters": None}, "rope_type is 'dynamic'"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(
    changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    file = write_model(tmp_path) / "config.json"
    table = {**json.loads(file.read_text()), **changed}
    file.write_text(json.dumps({k: v for k, v in table.items() if v is not None}))
    with pytest.raises(ValueError, match="config.json") as caught:
        Architecture.read(tmp_path)
    assert words in str(caught.value)


def test_layouts_that_do_not_divide_the_model_are_named() -> None:
    size = Architecture.read(MODELS / "Qwen2.5-7B")
    learner = LearnerSection(tensor_parallel=8, pipeline_parallel=3, expert_parallel=2)
    found = " ".join(layout_problems(size, learner))
    assert "learner.tensor_parallel = 8 does not divide num_attention_heads = 28" in found
    assert "learner.tensor_parallel = 8 does not divide num_key_value_heads = 4" in found
    assert "learner.pipeline_parallel = 3 does not divide the 28 layers" in found
    assert "learner.expert_parallel = 2: the models that the learner trains are dense" in found
    assert layout_problems(size, LearnerSection(tensor_parallel=4)) == []
