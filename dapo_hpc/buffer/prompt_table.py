"""Prepared prompts, read from parquet: columns uid, token_ids, data_source, ground_truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np

from dapo_hpc.records import Prompt

COLUMNS = ["uid", "token_ids", "data_source", "ground_truth"]


class PromptTable(Sequence[Prompt]):
    """Prompt of a row; the rows are numbered as in the file."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path, columns=COLUMNS).combine_chunks()
        lists = table["token_ids"].combine_chunks()
        self._uid = table["uid"].to_pylist()
        self._data_source = table["data_source"].to_pylist()
        self._ground_truth = table["ground_truth"].to_pylist()
        self._offsets = np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy())])
        self._tokens = lists.flatten().to_numpy().astype(np.int32)

    def __len__(self) -> int:
        return len(self._uid)

    @overload
    def __getitem__(self, row: int) -> Prompt: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, row: int | slice) -> Prompt | Sequence[Prompt]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} prompts.")
        return Prompt(
            uid=self._uid[row],
            row=row,
            token_ids=self._tokens[self._offsets[row] : self._offsets[row + 1]],
            data_source=self._data_source[row],
            ground_truth=self._ground_truth[row],
        )
