"""Models and batches that are measured, smallest first. Weights are drawn, norms and biases too."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A Qwen2 model."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    is_tied: bool = True

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def parameters(self) -> int:
        """Norms and the biases of query, key and value included."""
        kv = self.kv_heads * self.head_size
        attention = 2 * self.hidden * (self.hidden + kv) + self.hidden + 2 * kv
        layer = attention + 3 * self.hidden * self.ffn + 2 * self.hidden
        tables = self.vocab * self.hidden * (1 if self.is_tied else 2)
        return self.layers * layer + tables + self.hidden

    def named(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Load:
    """A mini-batch of responses of ragged lengths, as a policy's: log-normal, cut at a limit."""

    prompts: int
    group_size: int
    max_prompt_tokens: int
    median_response_tokens: int
    max_response_tokens: int
    spread: float
    """Standard deviation of the logarithm of a length."""
    micro_batch_tokens: int
    """Places of one forward pass at most, padding included, for everybody."""

    def named(self) -> dict[str, Any]:
        return asdict(self)


ARCHITECTURES = {
    "tiny": Architecture(layers=2, hidden=32, ffn=48, heads=4, kv_heads=2, vocab=64),
    "small": Architecture(layers=4, hidden=256, ffn=768, heads=4, kv_heads=2, vocab=8192),
    # Qwen2.5-0.5B and Qwen2.5-1.5B.
    "0.5b": Architecture(layers=24, hidden=896, ffn=4864, heads=14, kv_heads=2, vocab=151936),
    "1.5b": Architecture(layers=28, hidden=1536, ffn=8960, heads=12, kv_heads=2, vocab=151936),
}
SHORT = Load(
    prompts=2,
    group_size=3,
    max_prompt_tokens=5,
    median_response_tokens=6,
    max_response_tokens=16,
    spread=0.7,
    micro_batch_tokens=48,
)
MIDDLE = Load(
    prompts=4,
    group_size=4,
    max_prompt_tokens=48,
    median_response_tokens=128,
    max_response_tokens=512,
    spread=0.7,
    micro_batch_tokens=1024,
)
LONG = Load(
    prompts=8,
    group_size=8,
    max_prompt_tokens=256,
    median_response_tokens=900,
    max_response_tokens=4096,
    spread=0.8,
    micro_batch_tokens=8704,
)
LOADS = {"tiny": SHORT, "small": MIDDLE, "0.5b": LONG, "1.5b": LONG}
"""By the name of the architecture."""


def write_model(directory: Path, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
    """A Hugging Face directory with drawn weights, from which everybody starts."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=architecture.vocab,
        hidden_size=architecture.hidden,
        intermediate_size=architecture.ffn,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        tie_word_embeddings=architecture.is_tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    torch.manual_seed(seed)
    model = transformers.Qwen2ForCausalLM(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.02 * torch.randn_like(parameter)
            parameter.copy_(1 + noise if "norm" in name else noise)
    model.save_pretrained(directory)
