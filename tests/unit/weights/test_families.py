"""Every family of the table computes what transformers computes; what it would not is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
import transformers
from torch import Tensor

from dapo_hpc.learner.forward import log_probs, row
from dapo_hpc.learner.model import Policy
from dapo_hpc.learner.parallel import Layout, connect
from dapo_hpc.weights import families
from dapo_hpc.weights.families import Family
from dapo_hpc.weights.source import SafetensorsSource
from tests.learner_parts import VOCAB, make_model

LENGTHS = np.array([7, 1, 120])
TOLERANCE = 1e-4
"""Of logits of about 4; both sides are float32 and sum in different orders."""
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
}
CASES = [
    ("qwen2", False, "default"),
    ("qwen2", True, "default"),  # as the small models of Qwen2.5
    ("qwen3", False, "default"),
    ("qwen3", True, "default"),
    ("llama", False, "default"),
    ("llama", True, "llama3"),  # as Llama 3.2
    ("llama", False, "linear"),
    ("qwen2", False, "yarn"),  # as Qwen2.5 beyond 32768 tokens
]


def make(directory: Path, family: str, *, tied: bool, rope: str = "default") -> Any:
    """A tiny model of a family; returns transformers' own."""
    config = make_model(directory, family, tied=tied).config
    config.rope_parameters = {"rope_type": rope, "rope_theta": 1000.0, **ROPES[rope]}
    config.save_pretrained(directory)
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )


def logits(policy: Policy, tokens: np.ndarray) -> Tensor:
    """[T, V]: the hidden states after the last norm times the output layer."""
    hidden: list[Tensor] = []
    norm = policy.module.decoder.final_layernorm
    hook = norm.register_forward_hook(lambda _norm, _input, output: hidden.append(output))
    log_probs(policy, [row(policy, tokens, tokens, LENGTHS)])
    hook.remove()
    shape = policy.shape
    name = "embedding.word_embeddings.weight" if shape.is_tied else "output_layer.weight"
    return (hidden[0][:, 0] @ policy.module.get_parameter(name)[: shape.vocab].T).detach()


def expected_logits(model: Any, tokens: np.ndarray) -> Tensor:
    sequences = np.split(tokens, np.cumsum(LENGTHS)[:-1])
    with torch.no_grad():
        return torch.cat([model(torch.from_numpy(ids)[None]).logits[0] for ids in sequences])


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("family", "tied", "rope"), CASES)
def test_logits_are_those_of_transformers(
    family: str, tied: bool, rope: str, tmp_path: Path
) -> None:
    model = make(tmp_path, family, tied=tied, rope=rope)
    here = connect(Layout(), 0, None)
    policy = Policy(tmp_path, here, dtype=torch.float32, temperature=1.0)
    policy.load(SafetensorsSource(tmp_path))
    tokens = np.random.default_rng(0).integers(0, VOCAB, LENGTHS.sum())
    found, expected = logits(policy, tokens), expected_logits(model, tokens)
    assert found.shape == (LENGTHS.sum(), VOCAB)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    if rope != "default":  # negative control: the angles do matter at this length
        other = expected_logits(make(tmp_path, family, tied=tied), tokens)
        assert (other - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.usefixtures("alone")
def test_a_family_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/models.md says: one that shares Llama's mathematics needs nothing else."""
    config = transformers.MistralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=None,
        initializer_range=0.3,
    )
    model = transformers.MistralForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    here = connect(Layout(), 0, None)
    with pytest.raises(ValueError, match="model_type is mistral; expected one of qwen2, qwen3"):
        Policy(tmp_path, here, dtype=torch.float32, temperature=1.0)
    entry = Family(architecture="MistralForCausalLM", layer=families.DENSE, top=families.TOP)
    monkeypatch.setitem(families.FAMILIES, "mistral", entry)
    policy = Policy(tmp_path, here, dtype=torch.float32, temperature=1.0)
    policy.load(SafetensorsSource(tmp_path))
    tokens = np.random.default_rng(0).integers(0, VOCAB, LENGTHS.sum())
    expected = expected_logits(model, tokens)
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits(policy, tokens), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("family", "change", "problem"),
    [
        ("llama", {"attention_bias": True}, "attention_bias is True, expected False: the learner"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True, expected False: the learner"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True, expected False: the learner has no"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True, expected False: the"),
        (
            "qwen2",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types is ['full",
        ),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu': the learner's"),
        ("qwen2", {"attention_dropout": 0.1}, "attention_dropout is 0.1, expected 0.0: the"),
        ("qwen2", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config is {"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures is ['Lla"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide num_att"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "rope_type is 'dynamic', expec"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is"),
    ],
)
def test_a_field_that_changes_the_mathematics_is_refused(
    family: str, change: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    config = make_model(tmp_path, family).config
    assert families.problems(families.read_config(tmp_path)) == []
    if "rope_parameters" in change:
        rope = {**config.rope_parameters, "factor": 2.0, **change["rope_parameters"]}
        change = {"rope_parameters": rope}
    edit(tmp_path, change)
    found = families.problems(families.read_config(tmp_path))
    assert [text for text in found if text.startswith(problem)]


def edit(directory: Path, change: dict[str, Any]) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_a_config_that_cannot_be_one_is_refused_before_transformers_sees_it(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        families.read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="cannot be read"):
        families.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    with pytest.raises(ValueError, match="qwen3_moe; expected one of qwen2, qwen3, llama"):
        families.read_config(tmp_path)
    make_model(tmp_path)
    edit(tmp_path, {"hidden_size": "32"})
    with pytest.raises(ValueError, match="hidden_size"):
        families.read_config(tmp_path)
