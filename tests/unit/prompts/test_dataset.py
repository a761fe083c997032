"""Reading the DAPO-Math-17K schema: duplicates, hashes, and sentences about what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dapo_hpc.prompts import dataset

AIME = Path(__file__).resolve().parents[4] / "shared" / "data" / "aime-2024.parquet"


def row(text: str, answer: str = "1", **changes: Any) -> dict[str, Any]:
    return {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": text}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": 0},
        **changes,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_repeated_questions_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [row("1+2=", "3"), row("2+2=", "4"), row("1+2=", "3"), row("1+2=", "3")]
    found = dataset.read(write(tmp_path / "a.parquet", rows))
    assert [q.messages[0].content for q in found.questions] == ["1+2=", "2+2="]
    assert (found.num_rows, found.num_duplicates) == (4, 2)


def test_the_uid_depends_on_text_role_and_answer_only(tmp_path: Path) -> None:
    rows = [
        row("1+2=", "3"),
        row("1+2=", "4"),
        row("1+2= ", "3"),
        row("1+2=", "3", prompt=[{"role": "system", "content": "1+2="}]),
    ]
    uids = [q.uid for q in dataset.read(write(tmp_path / "a.parquet", rows)).questions]
    assert len(set(uids)) == 4
    moved = [row("filler"), row("1+2=", "3", data_source="elsewhere", ability="x")]
    again = dataset.read(write(tmp_path / "b.parquet", moved)).questions
    assert again[1].uid == uids[0]
    assert again[1].data_source == "elsewhere"


def test_one_text_with_two_answers_has_one_text_hash(tmp_path: Path) -> None:
    pair = dataset.read(write(tmp_path / "a.parquet", [row("1+2=", "3"), row("1+2=", "4")]))
    first, second = pair.questions
    assert first.text_hash == second.text_hash
    assert first.uid != second.uid


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"question": "1+2=", "answer": "3"}], "column data_source is missing; column prompt is"),
        ([row("x", prompt="1+2=")], "column prompt is string, not a list of"),
        ([row("x", reward_model={"answer": "3"})], "reward_model is struct<answer: string>"),
        (
            [row("x", reward_model={"ground_truth": 3})],
            "reward_model is struct<ground_truth: int64>",
        ),
        ([row("x"), row("y", data_source=None)], "row 1: data_source or reward_model"),
        ([row("x"), row("y", prompt=[])], "row 1: the prompt is empty"),
    ],
    ids=["columns", "text prompt", "no answer key", "number", "null", "empty prompt"],
)
def test_an_unusable_file_is_described(
    tmp_path: Path, rows: list[dict[str, Any]], sentence: str
) -> None:
    path = write(tmp_path / "bad.parquet", rows)
    with pytest.raises(ValueError, match="bad.parquet") as caught:
        dataset.read(path)
    assert sentence in str(caught.value)


def test_no_file_no_parquet_and_no_rows_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        dataset.read(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(ValueError, match="not a parquet file"):
        dataset.read(tmp_path / "text.parquet")
    schema = pa.Table.from_pylist([row("x")]).schema
    pq.write_table(schema.empty_table(), tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="has no rows"):
        dataset.read(tmp_path / "empty.parquet")


@pytest.mark.skipif(not AIME.exists(), reason="needs the AIME 2024 file of the verl project")
def test_aime_repeats_its_thirty_questions_32_times() -> None:
    found = dataset.read(AIME)
    assert (found.num_rows, len(found.questions)) == (960, 30)
    assert {q.data_source for q in found.questions} == {"math_dapo"}
    assert all(q.ground_truth.isdigit() for q in found.questions)
