"""Reads questions from parquet files in the schema of DAPO-Math-17K."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = ("data_source", "prompt", "reward_model")
BATCH_ROWS = 8192
"""Rows in memory at a time; the published file repeats its 17 thousand prompts a hundred times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of the conversation that asks the question."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt before it is tokenized."""

    messages: tuple[Message, ...]
    data_source: str
    ground_truth: str

    @property
    def text_hash(self) -> str:
        """Of the messages alone; two questions with one hash ask the same."""
        return _hash([[message.role, message.content] for message in self.messages])

    @property
    def uid(self) -> str:
        """Of messages and answer key; the same in every run that holds the prompt."""
        return _hash([self.text_hash, self.ground_truth])


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Distinct questions in file order."""

    path: Path
    questions: tuple[Question, ...]
    num_rows: int
    """Rows of the file; duplicates included."""

    @property
    def num_duplicates(self) -> int:
        return self.num_rows - len(self.questions)


def read(path: Path) -> Dataset:
    """Read a parquet file and drop repeated questions.

    Raises:
        ValueError: no such file, not parquet, a column is missing or of another type, a value is
            empty, or there are no rows; the sentence names the place.
    """
    file = _open(path)
    _check_columns(path, file.schema_arrow)
    questions: dict[str, Question] = {}
    num_rows = 0
    for row in _rows(file):
        question = _question(path, num_rows, row)
        questions.setdefault(question.uid, question)
        num_rows += 1
    if not questions:
        raise ValueError(f"{path}: the file has no rows; expected one prompt in each row.")
    return Dataset(path=path, questions=tuple(questions.values()), num_rows=num_rows)


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise ValueError(
            f"{path}: there is no such file; see prompts.train and prompts.eval."
        ) from None
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({error}).") from None


def _check_columns(path: Path, schema: pa.Schema) -> None:
    problems = [f"column {name} is missing" for name in COLUMNS if schema.get_field_index(name) < 0]
    problems += [
        f"column {name} is {schema.field(name).type}, not {expected}"
        for name, expected, is_right in _EXPECTED
        if schema.get_field_index(name) >= 0 and not is_right(schema.field(name).type)
    ]
    if problems:
        raise ValueError(
            f"{path}: {'; '.join(problems)}. Expected the schema of DAPO-Math-17K: data_source "
            "string, prompt list of {role, content}, reward_model {ground_truth}. The file has "
            f"{', '.join(schema.names)}."
        )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _has_text_fields(kind: pa.DataType, *names: str) -> bool:
    return bool(pa.types.is_struct(kind)) and all(
        kind.get_field_index(name) >= 0 and _is_text(kind.field(name).type) for name in names
    )


def _is_messages(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool(is_list) and _has_text_fields(kind.value_type, "role", "content")


_EXPECTED = (
    ("data_source", "string", _is_text),
    ("prompt", "a list of {role string, content string}", _is_messages),
    (
        "reward_model",
        "{ground_truth string}",
        lambda kind: _has_text_fields(kind, "ground_truth"),
    ),
)


def _rows(file: pq.ParquetFile) -> Iterator[dict[str, Any]]:
    for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(COLUMNS)):
        yield from batch.to_pylist()


def _question(path: Path, row: int, values: dict[str, Any]) -> Question:
    messages = values["prompt"] or []
    ground_truth = (values["reward_model"] or {}).get("ground_truth")
    if not messages or any(m["role"] is None or m["content"] is None for m in messages):
        raise ValueError(f"{path}, row {row}: the prompt is empty or has a message without text.")
    if ground_truth is None or values["data_source"] is None:
        raise ValueError(f"{path}, row {row}: data_source or reward_model.ground_truth is null.")
    return Question(
        messages=tuple(Message(role=m["role"], content=m["content"]) for m in messages),
        data_source=values["data_source"],
        ground_truth=ground_truth,
    )


def _hash(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
