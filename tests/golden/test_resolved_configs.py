"""`dapo config show` of every shipped config and every profile, compared in full."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_hpc import cli
from tests.golden.rewrite import RECORDS, ROOT, resolved

CASES = dict(resolved())


@pytest.mark.parametrize("name", CASES)
def test_resolved_config_is_the_recorded_one(name: str) -> None:
    record = RECORDS / f"{name}.toml"
    assert record.exists(), f"no record of {name}; `make golden` writes it"
    assert record.read_text() == CASES[name]


def test_no_record_is_left_over() -> None:
    assert {path.stem for path in RECORDS.glob("*.toml")} == set(CASES)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_config_show_prints_the_record(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", str(path)]) == 0
    assert capsys.readouterr().out == CASES[path.stem]
