"""From data sets to the prompts of a run: templated, tokenized, filtered, counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dapo_hpc.config import PromptsSection, RunConfig
from dapo_hpc.prompts import dataset
from dapo_hpc.prompts.dataset import Dataset, Question
from dapo_hpc.run_dir import RunDir, write_bytes, write_json

SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("data_source", pa.string()),
        ("ground_truth", pa.string()),
    ]
)
"""Of `prompts/train.parquet` and `prompts/eval.parquet`; row n is Prompt.row n."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What became of the rows of one file."""

    rows: int
    duplicates: int
    """Dropped: the same prompt and answer key came before."""
    too_long: int
    """Dropped: more than prompts.max_tokens tokens."""
    kept: int

    def sentence(self, name: str) -> str:
        return (
            f"{name}: {self.rows} rows, {self.duplicates} duplicates dropped, {self.too_long} "
            f"longer than prompts.max_tokens dropped, {self.kept} prompts."
        )


def prepare(run: RunDir, config: RunConfig, tokenizer: Any) -> dict[str, Counts]:
    """Write the run's prompt files; a second call gives the same files.

    Durability: each file appears whole; the training prompts come last, so their presence means
    that everything is there.

    Raises:
        ValueError: a data set is unusable, or held-out prompts are in the training set.
    """
    train = dataset.read(Path(config.prompts.train))
    files = {"train": (train, run.train_prompts)}
    if config.prompts.eval is not None:
        held_out = dataset.read(Path(config.prompts.eval))
        check_held_out(train, held_out)
        files = {"eval": (held_out, run.eval_prompts), **files}
    run.train_prompts.parent.mkdir(parents=True, exist_ok=True)
    counts = {
        name: _write(path, data, config.prompts, tokenizer) for name, (data, path) in files.items()
    }
    write_json(
        run.train_prompts.with_name("counts.json"), {name: asdict(c) for name, c in counts.items()}
    )
    return counts


def check_held_out(train: Dataset, held_out: Dataset) -> None:
    """Raises ValueError when held-out questions are trained on, whatever their answer keys."""
    trained = {question.text_hash for question in train.questions}
    shared = sum(question.text_hash in trained for question in held_out.questions)
    if shared:
        raise ValueError(
            f"{held_out.path}: {shared} of {len(held_out.questions)} held-out prompts are also in "
            f"the training set {train.path}: their accuracy would measure memory. Remove them from "
            "prompts.train, or choose another prompts.eval."
        )


def tokenize(question: Question, tokenizer: Any, config: PromptsSection) -> list[int]:
    """Token ids of a question, up to where the response begins."""
    if config.chat_template == "none":
        text = "".join(message.content for message in question.messages)
        return list(tokenizer(text)["input_ids"])
    messages = [asdict(message) for message in question.messages]
    return list(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    )


def _write(path: Path, data: Dataset, config: PromptsSection, tokenizer: Any) -> Counts:
    if config.chat_template == "tokenizer" and not tokenizer.chat_template:
        raise ValueError(
            f"prompts.chat_template = 'tokenizer', but the tokenizer in {tokenizer.name_or_path} "
            "has no chat template. Use a model that has one, or set prompts.chat_template to "
            "'none'."
        )
    kept = list(_rows_within_limit(data.questions, tokenizer, config))
    if not kept:
        raise ValueError(
            f"{data.path}: none of {len(data.questions)} prompts has 1 to {config.max_tokens} "
            "tokens. Raise prompts.max_tokens."
        )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(kept, schema=SCHEMA), sink)
    write_bytes(path, sink.getvalue().to_pybytes())
    return Counts(
        rows=data.num_rows,
        duplicates=data.num_duplicates,
        too_long=len(data.questions) - len(kept),
        kept=len(kept),
    )


def _rows_within_limit(
    questions: Iterable[Question], tokenizer: Any, config: PromptsSection
) -> Iterator[dict[str, Any]]:
    for question in questions:
        token_ids = tokenize(question, tokenizer, config)
        if 0 < len(token_ids) <= config.max_tokens:
            yield {
                "uid": question.uid,
                "token_ids": token_ids,
                "data_source": question.data_source,
                "ground_truth": question.ground_truth,
            }
