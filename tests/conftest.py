"""Tiny models for every test that needs a real engine or a real learner."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Before anything imports torch: engines in threads of one process must agree on it.
os.environ["OMP_NUM_THREADS"] = "1"

CHARACTERS = "0123456789+=$.ab"
"""One token each; '$' ends a response, '.' pads."""

MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def make_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """make_tiny_model(seed=0, layers=2): a Qwen2 with random weights in Hugging Face format.

    Weights are drawn wide (std 0.08), so that two seeds differ by whole nats.
    """
    made: dict[tuple[int, int], Path] = {}

    def make(*, seed: int = 0, layers: int = 2) -> Path:
        if (seed, layers) not in made:
            directory = tmp_path_factory.mktemp(f"tiny-{layers}-{seed}")
            _save_tokenizer(directory)
            _save_model(directory, seed, layers)
            made[seed, layers] = directory
        return made[seed, layers]

    return make


@pytest.fixture(scope="session")
def tiny_model(make_tiny_model: MakeModel) -> Path:
    """The tiny model most tests share."""
    return make_tiny_model()


def _save_tokenizer(directory: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: number for number, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="$", pad_token="."
    ).save_pretrained(directory)


def _save_model(directory: Path, seed: int, layers: int) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(CHARACTERS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=CHARACTERS.index("$"),
        pad_token_id=CHARACTERS.index("."),
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(directory)
