"""The model families the learner computes: one table. How to add one: docs/models.md.

A family says which Hugging Face tensors each Megatron parameter is made of and how that parameter
is split over tensor-parallel ranks. What a config may ask for is the same for all families: fields
that would change the mathematics are refused by name. Needs neither torch nor transformers, except
to read a config.

Legend of the dimensions: query = heads * head, key_value = key-value heads * head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["replicated", "vocab", "row", "qkv", "gate_up"]
"""How a Megatron parameter is split over tensor-parallel ranks:

replicated  every rank holds all of it
vocab       rows, after zero rows up to the next multiple of the ranks
row         columns (Megatron's RowParallelLinear)
qkv         key-value groups, each with its query rows, then its key, then its value
gate_up     rows of the gate and the same rows of the up projection
"""

Dim = Literal["hidden", "query", "key_value", "head", "ffn", "vocab"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """What one Megatron parameter holds."""

    kind: Kind
    tensors: Mapping[str, tuple[Dim, ...]]
    """Hugging Face names with their shapes, in the order in which they are fused."""


Table = Mapping[str, Parameter]
"""By Megatron's name: within one decoder layer, or of the whole model."""

DENSE: Table = {
    "input_layernorm.weight": Parameter("replicated", {"input_layernorm.weight": ("hidden",)}),
    "pre_mlp_layernorm.weight": Parameter(
        "replicated", {"post_attention_layernorm.weight": ("hidden",)}
    ),
    "self_attention.linear_qkv.weight": Parameter(
        "qkv",
        {
            "self_attn.q_proj.weight": ("query", "hidden"),
            "self_attn.k_proj.weight": ("key_value", "hidden"),
            "self_attn.v_proj.weight": ("key_value", "hidden"),
        },
    ),
    "self_attention.linear_proj.weight": Parameter(
        "row", {"self_attn.o_proj.weight": ("hidden", "query")}
    ),
    "mlp.linear_fc1.weight": Parameter(
        "gate_up",
        {"mlp.gate_proj.weight": ("ffn", "hidden"), "mlp.up_proj.weight": ("ffn", "hidden")},
    ),
    "mlp.linear_fc2.weight": Parameter("row", {"mlp.down_proj.weight": ("hidden", "ffn")}),
}
"""Of each decoder layer: pre-norm attention with grouped queries and a gated feed-forward."""

QKV_BIAS: Table = {
    "self_attention.linear_qkv.bias": Parameter(
        "qkv",
        {
            "self_attn.q_proj.bias": ("query",),
            "self_attn.k_proj.bias": ("key_value",),
            "self_attn.v_proj.bias": ("key_value",),
        },
    ),
}
QK_NORM: Table = {
    "self_attention.q_layernorm.weight": Parameter(
        "replicated", {"self_attn.q_norm.weight": ("head",)}
    ),
    "self_attention.k_layernorm.weight": Parameter(
        "replicated", {"self_attn.k_norm.weight": ("head",)}
    ),
}

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
OUTPUT = "output_layer.weight"

TOP: Table = {
    EMBEDDING: Parameter("vocab", {"model.embed_tokens.weight": ("vocab", "hidden")}),
    FINAL_NORM: Parameter("replicated", {"model.norm.weight": ("hidden",)}),
    OUTPUT: Parameter("vocab", {"lm_head.weight": ("vocab", "hidden")}),
}
"""Outside the layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Models that share names and mathematics."""

    architecture: str
    """What config.json calls the class with the language-model head."""
    layer: Table
    top: Table
    layer_prefix: str = "model.layers."
    """Of Hugging Face names, in front of the layer's number."""


FAMILIES: dict[str, Family] = {
    "qwen2": Family(architecture="Qwen2ForCausalLM", layer={**DENSE, **QKV_BIAS}, top=TOP),
    "qwen3": Family(architecture="Qwen3ForCausalLM", layer={**DENSE, **QK_NORM}, top=TOP),
    "llama": Family(architecture="LlamaForCausalLM", layer=DENSE, top=TOP),
}
"""By model_type of config.json."""

REQUIRED: dict[str, tuple[object, str]] = {
    "hidden_act": ("silu", "the learner's feed-forward is gated by silu"),
    "attention_bias": (False, "the learner has no bias on the output projection"),
    "mlp_bias": (False, "the learner has no biases in the feed-forward"),
    "use_sliding_window": (False, "the learner attends to whole sequences"),
    "attention_dropout": (0.0, "the learner drops nothing out"),
    "quantization_config": (None, "the learner reads plain bfloat16, float16 or float32"),
}
"""Config field -> the one value it may have where it is set, and why."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone."""

CONFIG = "config.json"


def read_config(directory: Path) -> Any:
    """The transformers config of a model directory.

    Raises:
        ValueError: there is none, it is of a family that is not in the table, or it contradicts
            itself.
    """
    path = directory / CONFIG
    if not path.exists():
        raise ValueError(f"{directory} holds no config.json; expected a Hugging Face model.")
    try:
        model_type = json.loads(path.read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Copy it again.") from None
    if model_type not in FAMILIES:
        raise ValueError(
            f"{path}: model_type is {model_type}; expected one of {', '.join(FAMILIES)}, all of "
            "them dense. docs/models.md says how to add a family."
        )
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        return transformers.AutoConfig.from_pretrained(directory)
    except StrictDataclassError as error:
        raise ValueError(f"{path}: transformers refuses it: {error}") from None


def problems(hf: Any) -> list[str]:
    """What a config asks for that the learner does not compute; empty for a model it can train."""
    found = [
        f"{field} is {getattr(hf, field)!r}, expected {value!r}: {why}"
        for field, (value, why) in REQUIRED.items()
        if getattr(hf, field, None) not in (None, value)
    ]
    architectures = getattr(hf, "architectures", None)
    expected = FAMILIES[hf.model_type].architecture
    if architectures and expected not in architectures:
        found.append(f"architectures is {architectures}, expected [{expected!r}]")
    if set(getattr(hf, "layer_types", None) or ()) - {"full_attention"}:
        found.append(f"layer_types is {hf.layer_types}, expected full_attention in every layer")
    if hf.num_attention_heads % hf.num_key_value_heads:
        found.append(
            f"num_key_value_heads = {hf.num_key_value_heads} does not divide "
            f"num_attention_heads = {hf.num_attention_heads}"
        )
    return found + _rope_problems(hf.rope_parameters or {})


def _rope_problems(rope: Mapping[str, Any]) -> list[str]:
    found = []
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        found.append(f"rope_type is {kind!r}, expected one of {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        found.append(
            f"partial_rotary_factor is {rope['partial_rotary_factor']}, expected 1.0: the learner "
            "rotates whole heads"
        )
    return found
