"""From data sets to a run's prompt files, with the real tokenizer of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dapo_hpc.config import RunConfig, parse
from dapo_hpc.prompts import dataset
from dapo_hpc.prompts.prepare import SCHEMA, prepare, tokenize
from dapo_hpc.roles import prompts as prompts_role
from dapo_hpc.run_dir import RunDir

transformers = pytest.importorskip("transformers", reason="needs transformers")

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


def write(path: Path, texts: list[str]) -> Path:
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": text}],
            "reward_model": {"ground_truth": str(len(text))},
        }
        for text in texts
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """Prompt section of a config: 6 rows, 4 of them distinct, 1 of these too long."""
    train = ["1+2=", "2+2=", "1+2=", "3+3=", "1+1+1+1+1=", "2+2="]
    return {
        "train": str(write(tmp_path / "train.parquet", train)),
        "eval": str(write(tmp_path / "eval.parquet", ["9+9=", "8+8="])),
        "max_tokens": 8,
        "chat_template": "none",
    }


def config_of(model: Path, prompts: dict[str, Any]) -> RunConfig:
    table = {
        "run": {"name": "t", "total_steps": 1},
        "model": {"path": str(model)},
        "prompts": prompts,
    }
    return parse(table)


def test_rows_are_tokenized_filtered_and_counted(
    tmp_path: Path, tiny_model: Path, tokenizer: Any, files: dict[str, Any]
) -> None:
    run = RunDir(tmp_path / "run")
    counts = prepare(run, config_of(tiny_model, files), tokenizer)
    train = pq.read_table(run.train_prompts)
    assert train.schema.equals(SCHEMA)
    assert [tokenizer.decode(ids) for ids in train["token_ids"].to_pylist()] == [
        "1+2=",
        "2+2=",
        "3+3=",
    ]
    assert train["ground_truth"].to_pylist() == ["4", "4", "4"]
    counted = counts["train"]
    assert (counted.rows, counted.duplicates, counted.too_long, counted.kept) == (6, 2, 1, 3)
    assert "6 rows, 2 duplicates dropped, 1 longer" in counted.sentence("train")
    assert pq.read_table(run.eval_prompts).num_rows == 2
    written = json.loads((run.root / "prompts" / "counts.json").read_text())
    assert written["eval"]["kept"] == 2


def test_uids_are_those_of_the_questions(
    tmp_path: Path, tiny_model: Path, tokenizer: Any, files: dict[str, Any]
) -> None:
    run = RunDir(tmp_path / "run")
    prepare(run, config_of(tiny_model, files), tokenizer)
    by_text = {q.messages[0].content: q.uid for q in dataset.read(Path(files["train"])).questions}
    for line in pq.read_table(run.train_prompts).to_pylist():
        assert line["uid"] == by_text[tokenizer.decode(line["token_ids"])]


def test_the_chat_template_ends_where_the_response_begins(
    tmp_path: Path, tiny_model: Path, tokenizer: Any, files: dict[str, Any]
) -> None:
    tokenizer.chat_template = TEMPLATE
    config = config_of(tiny_model, {**files, "chat_template": "tokenizer"})
    question = dataset.read(write(tmp_path / "one.parquet", ["1+2"])).questions[0]
    token_ids = tokenize(question, tokenizer, config.prompts)
    assert all(isinstance(token, int) for token in token_ids)
    assert tokenizer.decode(token_ids) == "1+2="


def test_a_tokenizer_without_a_template_is_refused(
    tmp_path: Path, tiny_model: Path, tokenizer: Any, files: dict[str, Any]
) -> None:
    config = config_of(tiny_model, {**files, "chat_template": "tokenizer"})
    with pytest.raises(ValueError, match="has no chat template"):
        prepare(RunDir(tmp_path / "run"), config, tokenizer)


def test_held_out_prompts_in_the_training_set_are_an_error(
    tmp_path: Path, tiny_model: Path, tokenizer: Any, files: dict[str, Any]
) -> None:
    leaked = write(tmp_path / "leaked.parquet", ["2+2=", "9+9=", "3+3="])
    run = RunDir(tmp_path / "run")
    with pytest.raises(ValueError, match="2 of 3 held-out prompts are also in the training set"):
        prepare(run, config_of(tiny_model, {**files, "eval": str(leaked)}), tokenizer)
    assert not run.train_prompts.exists()


def test_a_limit_below_every_prompt_is_an_error(
    tmp_path: Path, tiny_model: Path, tokenizer: Any, files: dict[str, Any]
) -> None:
    config = config_of(tiny_model, {**files, "max_tokens": 2})
    with pytest.raises(ValueError, match=r"none of \d prompts has 1 to 2 tokens"):
        prepare(RunDir(tmp_path / "run"), config, tokenizer)


def test_the_role_prepares_once(tmp_path: Path, tiny_model: Path, files: dict[str, Any]) -> None:
    run = RunDir(tmp_path / "run")
    config = config_of(tiny_model, files)
    assert prompts_role.main(run, config) == 0
    first = run.train_prompts.read_bytes()
    write(Path(files["train"]), ["7+7="])
    assert prompts_role.main(run, config) == 0
    assert run.train_prompts.read_bytes() == first


def test_preparing_twice_gives_the_same_bytes(
    tmp_path: Path, tiny_model: Path, tokenizer: Any, files: dict[str, Any]
) -> None:
    config = config_of(tiny_model, files)
    first, second = RunDir(tmp_path / "a"), RunDir(tmp_path / "b")
    prepare(first, config, tokenizer)
    prepare(second, config, tokenizer)
    assert first.train_prompts.read_bytes() == second.train_prompts.read_bytes()
