"""Seeded histories full of faults keep every promise, and planted bugs do not go unnoticed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.chaos.checker import KINDS
from tests.chaos.plants import PLANTS, planted
from tests.chaos.run import Totals, main
from tests.chaos.world import draw_scenario, run_seed

ROOT = Path(__file__).resolve().parents[2]
NUM_SEEDS = 30
NUM_SEEDS_FULL = 600
NUM_PLANT_SEEDS = 60
"""Of a plant: it must be found before."""


def run_seeds(seeds: range) -> Totals:
    totals = Totals()
    for seed in seeds:
        verdict = run_seed(seed)
        assert verdict.problems == [], f"seed {seed}"
        totals.add(verdict)
    return totals


def test_no_promise_is_broken() -> None:
    totals = run_seeds(range(1, 1 + NUM_SEEDS))
    assert set(totals.faults) == set(draw_scenario(1).fault_gaps_s), "every kind of fault happened"
    for kind in (
        "batches taken again",
        "buffer fenced",
        "buffer killed in a write",
        "buffer stopped in a write",
        "group commits put off, disk full",
        "learners fenced",
        "responses continued",
        "responses recovered",
    ):
        assert totals.counts[kind] > 0, f"{kind}: the seeds test less than they should"


@pytest.mark.full
def test_no_promise_is_broken_in_many_histories() -> None:
    run_seeds(range(10_000, 10_000 + NUM_SEEDS_FULL))


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found(name: str) -> None:
    """By its own symptom, not only as a run that gets stuck."""
    plant = PLANTS[name]
    found: Counter[str] = Counter()
    for seed in range(1, 1 + NUM_PLANT_SEEDS):
        with planted(name):
            found.update(problem.partition(":")[0] for problem in run_seed(seed).problems)
        if found.keys() & set(plant.found_as):
            return
    raise AssertionError(f"not found in {NUM_PLANT_SEEDS} seeds; other problems: {dict(found)}")


def test_the_kinds_of_symptoms_are_the_checkers() -> None:
    assert {kind for plant in PLANTS.values() for kind in plant.found_as} <= set(KINDS)


def test_a_seed_is_one_history() -> None:
    first, again = run_seed(7), run_seed(7)
    assert (first.counts, first.faults, first.virtual_s) == (
        again.counts,
        again.faults,
        again.virtual_s,
    )
    assert run_seed(8).counts != first.counts


def test_a_failing_seed_prints_the_line_that_repeats_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plant = "commit releases too much"
    assert main(["--seeds", "20", "--plant", plant, "--out", str(tmp_path / "out.json")]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("python -m"))
    command, _, comment = line.partition("  # ")
    words = [sys.executable, *shlex.split(command)[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    repeated = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert f"  # {comment}" in repeated.stdout
