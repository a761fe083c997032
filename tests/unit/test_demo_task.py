"""The demo's data: disjoint, repeatable, right, and readable by the real tokenizer."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dapo_hpc.demo import digits

SECTIONS = ("sft", "train", "heldout")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    digits.write(directory, seed=0)
    return directory


def rows(directory: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(directory / f"{name}.parquet").to_pylist()
    return found


def texts(directory: Path, name: str) -> list[str]:
    if name == "sft":
        return [row["prompt"] for row in rows(directory, name)]
    return [row["prompt"][0]["content"] for row in rows(directory, name)]


def evaluate(expression: str) -> int:
    """The truth, by other means than the code under test."""
    return sum(int(c) for c in expression if c.isdigit()) % 10


def test_held_out_prompts_are_nowhere_else(written: Path) -> None:
    heldout, train, sft = (set(texts(written, name)) for name in ("heldout", "train", "sft"))
    assert heldout.isdisjoint(train)
    assert heldout.isdisjoint(sft)
    assert not train.isdisjoint(sft), "the comparison would find an overlap"


def test_prompts_are_unique_and_of_all_lengths(written: Path) -> None:
    for name, wanted in (("heldout", digits.HELDOUT), ("train", digits.TRAIN)):
        found = texts(written, name)
        assert len(found) == len(set(found))
        assert Counter(text.count("+") + 1 for text in found) == wanted


def test_answers_are_the_sums(written: Path) -> None:
    for name in ("train", "heldout"):
        for row in rows(written, name):
            text = row["prompt"][0]["content"]
            assert row["reward_model"]["ground_truth"] == str(evaluate(text))
            assert row["data_source"] == f"sum_of_{text.count('+') + 1}"


def test_same_seed_same_bytes_other_seed_other_prompts(written: Path, tmp_path: Path) -> None:
    digits.write(tmp_path / "again", seed=0)
    digits.write(tmp_path / "other", seed=1)
    for name in SECTIONS:
        content = (written / f"{name}.parquet").read_bytes()
        assert (tmp_path / "again" / f"{name}.parquet").read_bytes() == content
        assert texts(tmp_path / "other", name) != texts(written, name)


def test_supervised_pairs_come_in_their_order(written: Path) -> None:
    pairs = rows(written, "sft")
    short = digits.SFT_BATCH * digits.SFT_BATCHES_SHORT
    chain_end = short + digits.SFT_BATCH * digits.SFT_BATCHES_CHAIN
    assert len(pairs) == chain_end + digits.SFT_BATCH * digits.SFT_BATCHES_MIXTURE
    assert max(row["prompt"].count("+") for row in pairs[:short]) == 2
    assert max(row["prompt"].count("+") for row in pairs[short:chain_end]) == 5
    for row in pairs[:chain_end]:
        assert digits.score(row["response"], str(evaluate(row["prompt"])))
        assert ("=" in row["response"]) == (row["prompt"].count("+") > 1)
    long = [row for row in pairs[chain_end:] if row["prompt"].count("+") > 1]
    guesses = sum("=" not in row["response"] for row in long) / len(long)
    assert guesses == pytest.approx(digits.GUESS_FRAC, abs=0.03)
    right = sum(digits.score(r["response"], str(evaluate(r["prompt"]))) for r in long) / len(long)
    assert 0.2 < right < 0.5


def test_chain_adds_from_the_left() -> None:
    rng = random.Random(0)
    assert digits.chain_text((7, 5, 8, 3), rng) == "7+5=2+8=0+3=3"
    assert digits.chain_text((7, 5), rng) == "2"
    noisy = [digits.chain_text((7, 5, 8), rng, noise_frac=1.0) for _ in range(50)]
    assert len({text[4] for text in noisy}) > 5
    assert all(text.startswith("7+5=") for text in noisy)


def test_longest_response_stays_under_the_overlong_slope() -> None:
    longest = digits.chain_text((9,) * digits.MAX_DIGITS, random.Random(0)) + digits.END
    assert len(longest) == 22


@pytest.mark.parametrize(
    ("response", "is_correct"),
    [
        ("3", True),
        ("7+5=2+8=0+3=3", True),
        ("7+5=2+8=0+3=3$", True),
        ("7+5=9+8=0+3=3", True),  # the outcome counts, not the way
        ("7+5=2+8=0+3=4", False),
        ("7+5=2+8=0+3=", False),
        ("7+5=2+8=0+3=33", False),
        ("=3+", False),
        ("", False),
        ("٣", False),  # a digit, but not one of ours
        ("3\n", False),
    ],
)
def test_score(response: str, is_correct: bool) -> None:
    assert digits.score(response, "3") is is_correct


def test_tokenizer_gives_one_token_for_each_character_and_back(written: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(written / "model")
    text = "9+0=9+8=7"
    ids = tokenizer(text)["input_ids"]
    assert ids == [digits.VOCABULARY.index(character) for character in text]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == digits.VOCABULARY.index(digits.END)
    assert tokenizer.pad_token_id == digits.VOCABULARY.index(digits.PAD)
    assert len(tokenizer) == len(digits.VOCABULARY)


def test_model_config_is_a_qwen2_of_the_stated_size(written: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(written / "model")
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert sum(p.numel() for p in model.parameters()) == 792_704
    assert config.rope_parameters["rope_theta"] == 1000.0
