"""A base model made the real way, and whole runs that leave no process behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dapo_hpc import config
from tests.fault.whole_run import DEMO, WholeRun, dapo, set_options

SFT_BATCHES = 60
"""Enough for direct guesses: one in ten is right, so most groups of eight are informative."""


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and a base model that guesses digits, from `dapo demo-data` and `dapo sft`."""
    directory = tmp_path_factory.mktemp("base")
    assert dapo("demo-data", str(directory / "data"), "--seed", "5").wait(timeout=120) == 0
    pairs = directory / "data" / "sft.parquet"
    rows = pq.read_table(pairs)
    batch = config.load(DEMO).sft.batch_size  # type: ignore[union-attr]
    pq.write_table(rows.slice(rows.num_rows - SFT_BATCHES * batch), pairs)
    settings = {
        "run.dir": directory,
        "run.name": "sft",
        "model.path": directory / "base",
        "sft.init": directory / "data" / "model",
        "sft.pairs": pairs,
    }
    assert dapo("sft", str(DEMO), *set_options(settings)).wait(timeout=300) == 0
    return directory


@pytest.fixture
def whole_run(base: Path, tmp_path: Path) -> Iterator[WholeRun]:
    run = WholeRun(base=base, directory=tmp_path)
    yield run
    run.kill_everything()
