"""The dispatch simulation: its engines, its policies, and what it says of ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "perf"))

import sim_dispatch  # noqa: E402
from dispatch_sim.engines import SLOTS, STEP_S, STEP_S_PER_RESPONSE, Engines  # noqa: E402
from dispatch_sim.ours import Fleet  # noqa: E402
from dispatch_sim.peers import Central, first_finished, oracle, rounds  # noqa: E402
from dispatch_sim.policies import FIRST_FINISHED, ORACLE, OURS, STOP_AT_FIRST, run  # noqa: E402
from dispatch_sim.report import rows_of  # noqa: E402
from dispatch_sim.workload import MAX_TOKENS, Workload  # noqa: E402

ALONE_S, TOGETHER_S = STEP_S + STEP_S_PER_RESPONSE, STEP_S + 2 * STEP_S_PER_RESPONSE


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    """The small simulation, by policy."""
    found = sim_dispatch.measure(sim_dispatch.SMALL[0], sim_dispatch.POLICIES)
    return {row["policy"]: row for row in found}


# ------------------------------------------------------------------ the simulator


def test_two_responses_advance_together_and_the_second_goes_on_faster_alone() -> None:
    engines = Engines(1)
    for name, length in (("short", 100), ("long", 300)):
        engines.all[0].start(name, length, 0.0)
    engines.changed(0)
    assert engines.pop() == (0, "short")
    assert engines.now == pytest.approx(100 * TOGETHER_S)
    assert engines.pop() == (0, "long")
    assert engines.now == pytest.approx(100 * TOGETHER_S + 200 * ALONE_S)
    assert engines.tokens == pytest.approx(400)


def test_what_is_given_up_is_paid_as_far_as_it_came() -> None:
    engines = Engines(2)
    engines.all[0].start("kept", 100, 0.0)
    engines.all[1].start("dropped", 1000, 0.0)
    for index in range(2):
        engines.changed(index)
    engines.pop()
    engines.clear()
    assert engines.tokens == pytest.approx(200)
    assert engines.next_s() == float("inf")


def test_the_paying_oracle_takes_as_long_as_its_longest_informative_response() -> None:
    """With more slots than responses that is all there is to it, but for the changing speed."""
    central = Central(Workload(3, group_size=4), Engines(50))
    step = oracle(central, 10, is_paying=True)
    draws = [Workload(3, 4).draw(Workload(3).order.at(n)[1]) for n in range(step.num_dispatched)]
    longest = max(max(draw.lengths) for draw in draws if draw.is_informative)
    assert longest * ALONE_S <= central.engines.now <= longest * TOGETHER_S
    assert sum(draw.is_informative for draw in draws) == 10
    assert draws[-1].is_informative


def test_policies_of_others_do_what_their_sources_do() -> None:
    workload = Workload(1)
    informative = [workload.draw(workload.order.at(n)[1]).is_informative for n in range(200)]
    repeat = rounds(Central(workload, Engines(4)), 20, factor=1)
    num_rounds = next(n for n in range(1, 11) if sum(informative[: 20 * n]) >= 20)
    assert repeat.num_dispatched == 20 * num_rounds
    stop = first_finished(Central(workload, Engines(4)), 20, factor=2)
    assert stop.num_groups == 20
    assert stop.num_dispatched == 40


def test_ours_trains_the_groups_that_the_oracle_trains() -> None:
    """The first informative ones of the order, whatever finishes when: on the first step both have
    the same prompts with the same outcomes."""
    ours = run(OURS, num_engines=3, num_groups=24, seed=5, num_steps=1)[0]
    best = run(ORACLE, num_engines=3, num_groups=24, seed=5, num_steps=1)[0]
    assert ours.used_mean == best.used_mean
    assert ours.used_tokens == best.used_tokens
    first = run(FIRST_FINISHED, num_engines=3, num_groups=24, seed=5, num_steps=1)[0]
    assert first.used_tokens < best.used_tokens


def test_the_same_seed_gives_the_same_run() -> None:
    both = [run(OURS, num_engines=2, num_groups=8, seed=2, num_steps=2) for _ in range(2)]
    assert both[0] == both[1]
    assert both[0] != run(OURS, num_engines=2, num_groups=8, seed=3, num_steps=2)


def test_the_books_of_the_core_balance_after_a_run() -> None:
    fleet = Fleet(Workload(0), Engines(3), 12)
    for step in range(1, 4):
        fleet.fill(step)
        assert fleet.core.check() == []
    assert fleet.core.book.state.counters["tokens_surplus"] >= 0
    assert all(len(engine.active) <= SLOTS for engine in fleet.engines.all)


def test_lengths_are_cut_at_the_limit_and_harder_prompts_are_longer() -> None:
    workload = Workload(0)
    draws = [workload.draw(row) for row in range(3000)]
    assert max(max(draw.lengths) for draw in draws) == MAX_TOKENS
    hard = [n for d in draws if sum(d.is_correct) <= 2 for n in d.lengths]
    easy = [n for d in draws if sum(d.is_correct) >= 14 for n in d.lengths]
    assert sum(hard) / len(hard) > 1.3 * sum(easy) / len(easy)
    assert workload.draw(7, 1).lengths != workload.draw(7).lengths


# ------------------------------------------------------------------ what is claimed


def test_ours_is_near_the_oracle_that_pays(rows: dict[str, Any]) -> None:
    assert rows[OURS]["to_oracle"] <= 1.15
    assert rows[OURS]["first_to_oracle"] <= 1.15, "also before anything is learned"
    assert rows[OURS]["waste_frac"] < rows[ORACLE]["waste_frac"] + 0.1


def test_ours_is_faster_than_generate_filter_repeat(rows: dict[str, Any]) -> None:
    assert rows[OURS]["repeat_over"] >= 1.3


def test_ours_has_no_length_bias_and_the_others_have(rows: dict[str, Any]) -> None:
    """Stopping at the first that finish is the negative control, in slime's way and in ours."""
    assert rows[OURS]["length_ratio"] == pytest.approx(1.0, abs=0.015)
    assert rows[FIRST_FINISHED]["length_ratio"] < 0.98
    assert rows[STOP_AT_FIRST]["length_ratio"] < 0.93


@pytest.mark.parametrize("num_engines", [16, 64])
def test_larger_fleets_keep_to_it(num_engines: int) -> None:
    results = {
        policy: [run(policy, num_engines=num_engines, num_groups=128, seed=0, num_steps=2)]
        for policy in (ORACLE, OURS, "verl 3x", "verl 1x")
    }
    found = {row["policy"]: row for row in rows_of(results)}
    assert found[OURS]["to_oracle"] <= 1.15
    assert found[OURS]["first_to_oracle"] <= 1.15


def test_a_reserve_of_nothing_would_miss_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the mean alone waits for a second round where engines are plenty."""
    size = {"num_engines": 64, "num_groups": 128, "seed": 0, "num_steps": 4}
    best = [run(ORACLE, **size)]
    monkeypatch.setattr("dapo_hpc.buffer.forecast.new_prompts.__defaults__", (0.0,))
    found = rows_of({ORACLE: best, OURS: [run(OURS, **size)]})
    assert found[1]["to_oracle"] > 1.15


def test_the_command_writes_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sim_dispatch, "SMALL", (sim_dispatch.Size(2, 4, 1, 2),))
    assert sim_dispatch.main(["--small", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert found["assumed"]["SLOTS"] == SLOTS
    assert [row["policy"] for row in found["sizes"][0]["rows"]] == list(sim_dispatch.POLICIES)
    assert "| ours |" in capsys.readouterr().out
