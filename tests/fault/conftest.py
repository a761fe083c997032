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


def make_base(directory: Path, *, sft_batches: int | None) -> Path:
    """Data and a base model, from `dapo demo-data` and `dapo sft` on the last batches of pairs."""
    assert dapo("demo-data", str(directory / "data"), "--seed", "5").wait(timeout=120) == 0
    pairs = directory / "data" / "sft.parquet"
    if sft_batches is not None:
        rows = pq.read_table(pairs)
        batch = config.load(DEMO).sft.batch_size  # type: ignore[union-attr]
        pq.write_table(rows.slice(rows.num_rows - sft_batches * batch), pairs)
    settings = {
        "run.dir": directory,
        "run.name": "sft",
        "model.path": directory / "base",
        "sft.init": directory / "data" / "model",
        "sft.pairs": pairs,
    }
    assert dapo("sft", str(DEMO), *set_options(settings)).wait(timeout=600) == 0
    return directory


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that guesses digits."""
    return make_base(tmp_path_factory.mktemp("base"), sft_batches=SFT_BATCHES)


@pytest.fixture(scope="session")
def demo_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's own base model."""
    return make_base(tmp_path_factory.mktemp("demo_base"), sft_batches=None)


@pytest.fixture
def whole_run(base: Path, tmp_path: Path) -> Iterator[WholeRun]:
    run = WholeRun(base=base, directory=tmp_path)
    yield run
    run.kill_everything()


@pytest.fixture
def demo_run(demo_base: Path, tmp_path: Path) -> Iterator[WholeRun]:
    run = WholeRun(base=demo_base, directory=tmp_path)
    yield run
    run.kill_everything()
