"""The demo task: sums of 2 to 6 digits modulo 10, learned by a model that starts from nothing.

A prompt is `7+5+8+3=`. The right response to it adds from the left, `7+5=2+8=0+3=3`; a sum of two
digits is answered at once. Supervised pairs teach the addition, then mix it with blind guesses, so
that reinforcement learning has something to find: the chain, which is longer and right.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

from dapo_hpc.run_dir import write_json

END, PAD = "$", "."
VOCABULARY = "0123456789+=" + END + PAD + "ab"
"""One token for each character; `a` and `b` are spare, so that 2, 4 or 8 ranks share it evenly."""
MIN_DIGITS, MAX_DIGITS = 2, 6
MAX_TOKENS = 64

SFT_BATCH = 64
SFT_BATCHES_SHORT = 150
"""Chains of up to three digits first: without them longer chains are learned late or never."""
SFT_BATCHES_CHAIN = 450
SFT_BATCHES_MIXTURE = 160
GUESS_FRAC = 0.6
"""Of the mixture's longer sums: answered with a random digit at once."""
NOISE_FRAC = 0.1
"""Of the mixture's chain steps: a random digit instead of the sum."""

HELDOUT = {2: 20, 3: 75, 4: 75, 5: 75, 6: 75}
"""Held-out prompts by number of digits; there are only 100 sums of two."""
TRAIN = {2: 80, 3: 920, 4: 1000, 5: 1000, 6: 1000}
"""Training prompts by number of digits: all that is left of the short ones."""

MODEL: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": len(VOCABULARY),
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_TOKENS,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "initializer_range": 0.04,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "bos_token_id": None,
    "eos_token_id": VOCABULARY.index(END),
    "pad_token_id": VOCABULARY.index(PAD),
    "dtype": "float32",
}

Sum = tuple[int, ...]


def write(out_dir: Path, seed: int) -> None:
    """Write `model/` (config, tokenizer, no weights), sft, train and heldout parquet.

    The same seed writes the same bytes. No held-out prompt is among the training prompts or the
    supervised pairs.
    """
    rng = random.Random(seed)
    heldout, train = draw_prompts(rng)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_model(out_dir / "model")
    _write_prompts(out_dir / "heldout.parquet", heldout)
    _write_prompts(out_dir / "train.parquet", train)
    pairs = draw_pairs(rng, set(heldout))
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"prompt": [p for p, _ in pairs], "response": [r for _, r in pairs]}
    pq.write_table(pa.table(columns), out_dir / "sft.parquet")


def score(response: str, ground_truth: str) -> bool:
    """Whether the text after the last `=`, or all of it without one, is the one right digit."""
    answer = response.removesuffix(END).rpartition("=")[2]
    return re.fullmatch(r"[0-9]", answer) is not None and answer == ground_truth


def prompt_text(digits: Sum) -> str:
    return "+".join(map(str, digits)) + "="


def answer_text(digits: Sum) -> str:
    return str(sum(digits) % 10)


def chain_text(digits: Sum, rng: random.Random, noise_frac: float = 0.0) -> str:
    """The response that adds from the left, `7+5=2+8=0`; each sum wrong with noise_frac."""
    total = digits[0]
    steps: list[str] = []
    for digit in digits[1:]:
        left, total = total, (total + digit) % 10
        if rng.random() < noise_frac:
            total = rng.randrange(10)
        steps.append(f"+{digit}={total}" if steps else f"{left}+{digit}={total}")
    return "".join(steps) if len(digits) > 2 else str(total)


# ------------------------------------------------------------------ drawing


def draw_prompts(rng: random.Random) -> tuple[list[Sum], list[Sum]]:
    """Held-out and training prompts: each one once, none in both, training ones shuffled."""
    heldout: list[Sum] = []
    train: list[Sum] = []
    for count in range(MIN_DIGITS, MAX_DIGITS + 1):
        wanted = HELDOUT[count] + TRAIN[count]
        drawn = [_nth_sum(n, count) for n in rng.sample(range(10**count), wanted)]
        heldout += drawn[: HELDOUT[count]]
        train += drawn[HELDOUT[count] :]
    rng.shuffle(train)
    return heldout, train


def draw_pairs(rng: random.Random, heldout: set[Sum]) -> list[tuple[str, str]]:
    """Supervised pairs in training order: short chains, chains, then the mixture with guesses."""
    phases = (
        (SFT_BATCHES_SHORT, 3, False),
        (SFT_BATCHES_CHAIN, MAX_DIGITS, False),
        (SFT_BATCHES_MIXTURE, MAX_DIGITS, True),
    )
    pairs = []
    for batches, max_digits, is_mixture in phases:
        for _ in range(batches * SFT_BATCH):
            digits = _draw_sum(rng, max_digits, heldout)
            text = _mixed_response(digits, rng) if is_mixture else chain_text(digits, rng)
            pairs.append((prompt_text(digits), text))
    return pairs


def _mixed_response(digits: Sum, rng: random.Random) -> str:
    if len(digits) > 2 and rng.random() < GUESS_FRAC:
        return str(rng.randrange(10))
    return chain_text(digits, rng, NOISE_FRAC)


def _draw_sum(rng: random.Random, max_digits: int, excluded: set[Sum]) -> Sum:
    count = rng.randint(MIN_DIGITS, max_digits)
    draws = (_nth_sum(rng.randrange(10**count), count) for _ in itertools.count())
    return next(digits for digits in draws if digits not in excluded)


def _nth_sum(number: int, count: int) -> Sum:
    return tuple(int(digit) for digit in f"{number:0{count}d}")


# ------------------------------------------------------------------ files


def write_model(directory: Path) -> None:
    """A Qwen2 config of 0.8 M parameters and a tokenizer of single characters; no weights."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", MODEL)
    ids = {"eos_token_id": MODEL["eos_token_id"], "pad_token_id": MODEL["pad_token_id"]}
    write_json(directory / "generation_config.json", ids)
    _tokenizer().save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": END,
            "pad_token": PAD,
            "unk_token": PAD,
            "padding_side": "left",
            "model_max_length": MAX_TOKENS,
            "clean_up_tokenization_spaces": False,
        },
    )


def _tokenizer() -> Any:
    """Byte-level BPE without merges: what transformers builds anew for the qwen2 model type."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    ids = {character: index for index, character in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True), AddedToken(PAD, special=True)])
    return tokenizer


def _write_prompts(path: Path, prompts: list[Sum]) -> None:
    """Parquet in the schema of DAPO-Math-17K; the data source names the number of digits."""
    rows = [
        {
            "data_source": f"sum_of_{len(digits)}",
            "prompt": [{"role": "user", "content": prompt_text(digits)}],
            "ability": "math",
            "reward_model": {"ground_truth": answer_text(digits), "style": "rule"},
            "extra_info": {"index": str(index)},
        }
        for index, digits in enumerate(prompts)
    ]
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def description(out_dir: Path) -> str:
    """One paragraph for the person who wrote the files."""
    import pyarrow.parquet as pq

    counts = {
        name: pq.read_metadata(out_dir / f"{name}.parquet").num_rows
        for name in ("sft", "train", "heldout")
    }
    model = json.loads((out_dir / "model" / "config.json").read_text())
    return (
        f"{out_dir}: {counts['sft']} supervised pairs, {counts['train']} training prompts, "
        f"{counts['heldout']} held-out prompts; model of {model['num_hidden_layers']} layers, "
        f"hidden size {model['hidden_size']}, without weights."
    )
