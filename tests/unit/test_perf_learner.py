"""The learner benchmark: what it counts, that everybody does the same step, and what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "perf"))

import bench_learner  # noqa: E402
from dapo_hpc.learner.packing import pack, plan_step  # noqa: E402
from learner_bench import flops, ours, plain, report  # noqa: E402
from learner_bench.batch import draw, sequences, summaries  # noqa: E402
from learner_bench.clock import PHASES  # noqa: E402
from learner_bench.shapes import ARCHITECTURES, LOADS, Architecture, write_model  # noqa: E402
from learner_bench.task import Job  # noqa: E402
from learner_bench.teams import Team, Turn, phases_of  # noqa: E402

TINY, LOAD = ARCHITECTURES["tiny"], LOADS["tiny"]


# ------------------------------------------------------------------ counts


def test_flops_are_those_counted_by_hand() -> None:
    model = Architecture(layers=2, hidden=8, ffn=3, heads=2, kv_heads=1, vocab=5)
    # Of one token in one layer: query and output 8 x 8, key and value 8 x 4, three of 8 x 3.
    of_token = 2 * (64 + 64 + 32 + 32 + 3 * 24)
    # Two products of 4 numbers for each of the 6 pairs of 3 tokens and each of 2 heads.
    attention = 2 * 2 * 4 * 6 * 2
    # 2 response tokens against 5 rows of 8.
    head = 2 * 2 * 8 * 5
    assert flops.forward(model, 3, 2) == 2 * (3 * of_token + attention) + head
    both = flops.of_batch(model, [(1, 2), (1, 2)])
    assert both == {
        "score": 2 * flops.forward(model, 3, 2),
        "update": 6 * flops.forward(model, 3, 2),
    }


def test_parameters_are_those_of_the_published_models() -> None:
    assert ARCHITECTURES["0.5b"].parameters() == 494_032_768
    assert ARCHITECTURES["1.5b"].parameters() == 1_543_714_304


def test_lengths_are_ragged_and_the_same_every_time() -> None:
    for name, load in LOADS.items():
        found = sequences(draw(load, ARCHITECTURES[name].vocab, seed=0))
        assert found == sequences(draw(load, ARCHITECTURES[name].vocab, seed=0))
        responses = [response for _, response in found]
        assert len(found) == load.prompts * load.group_size
        assert 1 <= min(responses) < np.median(responses) < max(responses)
        assert max(responses) <= load.max_response_tokens


def job(kind: str, model: Path = Path()) -> Job:
    return Job(
        name=kind,
        kind=kind,  # type: ignore[arg-type]  # a word of its list
        architecture=TINY,
        load=LOAD,
        model=model,
        device="cpu",
        dtype="float32",
    )


@pytest.mark.parametrize("data", [1, 2])
def test_every_token_is_counted_once_however_it_is_laid_out(data: int) -> None:
    groups = draw(LOAD, TINY.vocab, ours.SEED)
    counted = sequences(groups)
    plan = plan_step(
        summaries(groups), mini_batches=1, micro_batch_tokens=48, data_parallel=data, seed=0
    )
    shape = (LOAD.prompts, LOAD.group_size)
    packed = [
        pack(members, dict(enumerate(groups)), advantages=np.ones(shape), weights=np.ones(shape))
        for rank in plan.mini_batches[0].ranks
        for members in rank
    ]
    real = sum(len(micro.token_ids) - micro.num_padding_tokens for micro in packed)
    assert real == sum(map(sum, counted))
    assert sum(int(micro.loss_mask.sum()) for micro in packed) == sum(r for _, r in counted)


@pytest.mark.parametrize("kind", ["padded", "by length"])
def test_a_plain_layout_keeps_the_budget_and_every_response_token(kind: str) -> None:
    micros = plain.micros_of(job(kind), torch.device("cpu"))
    counted = sequences(draw(LOAD, TINY.vocab, plain.SEED))
    assert len(micros) > 1
    assert all(micro.token_ids.numel() <= LOAD.micro_batch_tokens for micro in micros)
    trained = sum(int((micro.weights > 0).sum()) for micro in micros)
    assert trained == sum(response for _, response in counted)
    assert sum(float(micro.weights.sum()) for micro in micros) == pytest.approx(1.0)


# ------------------------------------------------------------------ the same step


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "model"
    write_model(directory, TINY, torch.float32, seed=0)
    return directory


@pytest.fixture
def learner(model: Path, tmp_path: Path, alone: None) -> ours.Learner:  # noqa: ARG001
    return ours.Learner(job("ours", model), 0, tmp_path)


def test_ours_and_the_plain_steps_compute_the_same(model: Path, learner: ours.Learner) -> None:
    everybody = [learner, *(plain.Plain(job(kind, model)) for kind in ("padded", "by length"))]
    for _ in range(2):
        for one in everybody:
            laps = one.step()
            assert list(laps.ends_s) == list(PHASES)
            assert laps.ends_s["score"] < laps.ends_s["update"] < laps.ends_s["optimizer"]
        first, *others = [one.check() for one in everybody]
        assert first["tokens"] == sum(r for _, r in sequences(draw(LOAD, TINY.vocab, 0)))
        for other in others:
            # Float32 with other shapes of the same products.
            assert other == pytest.approx(first, rel=1e-5)


def turn(update_s: float = 0.5, grad_norm: float = 1.0, tokens: float = 4.0) -> Turn:
    check = {"mean_logprob": -4.0, "grad_norm": grad_norm, "tokens": tokens}
    phases_s = {"score": 0.25, "update": update_s, "optimizer": 0.25}
    return Turn(phases_s, {name: 2 * value for name, value in phases_s.items()}, check)


def team_of(job: Job, *turns: Turn) -> Team:
    return Team(job, "ready", turns=list(turns))


def test_a_step_with_another_loss_is_called_wrong(model: Path) -> None:
    right = team_of(job("padded", model), turn(grad_norm=1.0))
    close = team_of(job("ours", model), turn(grad_norm=1.0001))
    wrong = team_of(job("ours", model), turn(grad_norm=1.01))
    twice = team_of(job("ours", model), turn(tokens=8.0))
    named = {"plain": right, "close": close, "wrong": wrong, "twice": twice}
    rows = {row["team"]: row for row in report.rows_of(named, [(2, 4)], 1e9)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "plain": "ready",
        "close": "ready",
        "wrong": "wrong",
        "twice": "wrong",
    }
    assert "over 8 tokens; the plain step has 1 over 4" in rows["twice"]["reason"]


# ------------------------------------------------------------------ figures


def test_a_phase_ends_where_the_last_rank_ends_it() -> None:
    ends = [
        {"score": 1.0, "update": 4.0, "optimizer": 4.5},
        {"score": 2.0, "update": 3.0, "optimizer": 4.75},
    ]
    assert phases_of(ends, max) == {"score": 2.0, "update": 2.0, "optimizer": 0.75}
    assert phases_of(ends, sum) == {"score": 3.0, "update": 4.0, "optimizer": 2.25}
    assert phases_of([{"optimizer": 2.0}], max) == {"score": 0.0, "update": 0.0, "optimizer": 2.0}


def test_rates_are_tokens_of_the_batch_over_medians() -> None:
    two = replace(job("ours"), tensor=2)
    team = team_of(two, turn(0.5), turn(0.75), turn(9.0))
    team.held_mib, team.peak_mib = 100.0, 150.0
    (row,) = report.rows_of({"ours": team}, [(2, 4), (1, 3)], 1e6)
    assert row["tokens"] == 10, "not once for each rank"
    assert row["tokens_per_s"] == pytest.approx(10 / 1.0)
    assert row["tokens_per_s_with_scoring"] == pytest.approx(10 / 1.25)
    assert row["tokens_per_cpu_s"] == pytest.approx(5.0)
    assert row["extra_memory_mib"] == 50.0
    needed = 3 * (flops.forward(TINY, 6, 4) + flops.forward(TINY, 4, 3))
    assert row["mfu_train"] == pytest.approx(needed / 1.0 / 2e6), "of what two processes could do"


def test_targets_compare_steps_of_the_same_round() -> None:
    mine = team_of(job("ours"), turn(0.75), turn(1.75))
    theirs = team_of(job("padded"), turn(0.25), turn(1.25))
    named = {report.OURS: mine, "plain, padded": theirs, "plain, absent": Team(job("by length"))}
    found, absent = report.targets_of(named, "cpu")
    assert found["tokens_per_s"] == pytest.approx((0.5 / 1.0 + 1.5 / 2.0) / 2)
    assert found["met"] is False
    assert absent["met"] is None
    assert report.targets_of(named, "cuda")[0]["bound"] == 1.0


def test_what_cannot_run_is_listed_and_the_rest_is_measured() -> None:
    assert bench_learner.left_out({"one": job("ours")}, "cpu") == {}
    gone = Team(job("ours"), "absent", reason="there is no module megatron")
    (row,) = report.rows_of({"ours": gone}, [(1, 1)], None)
    assert row["reason"] == "there is no module megatron"
    assert "tokens_per_s" not in row


def rank(*said: Any) -> tuple[Any, Any]:
    """A rank that has said so much and died."""
    ours_, theirs = Pipe()
    for answer in said:
        theirs.send(answer)
    theirs.close()
    return SimpleNamespace(exitcode=-9, join=lambda **_: None, is_alive=lambda: False), ours_


def test_a_team_is_left_out_with_the_reason_of_the_rank_that_failed_first() -> None:
    whole = Team(job("ours"), ranks=[rank(("ready", 3.0))])
    whole.wait()
    assert (whole.status, whole.held_mib) == ("ready", 3.0)
    dead = Team(job("ours"), ranks=[rank()])
    dead.wait()
    assert (dead.status, dead.reason) == ("failed", "the process died, exit status -9")
    absent = Team(replace(job("ours"), tensor=2))
    waiting, other = Pipe()
    absent.ranks = [(rank()[0], waiting), rank(("absent", "there is no module megatron"))]
    absent.wait()
    assert (absent.status, absent.reason) == ("absent", "rank 1: there is no module megatron")
    other.close()


# ------------------------------------------------------------------ the whole script


@pytest.mark.slow
def test_the_script_writes_one_json_and_one_table(tmp_path: Path) -> None:
    words = [sys.executable, "perf/bench_learner.py", "--model", "tiny", "--rounds", "2"]
    words += ["--device", "cpu", "--output", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    table, figures = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    found = json.loads(figures.read_text())
    wanted = {"question", "machine", "model", "architecture", "parameters", "dtype", "load"}
    wanted |= {"batch", "rounds", "matmul_flops_per_s", "rows", "targets", "load_average_after"}
    assert wanted <= set(found)
    machine = {"commit", "torch", "transformers", "megatron-core", "cpu", "cores", "load_average"}
    assert machine <= set(found["machine"])
    rows = {row["team"]: row for row in found["rows"]}
    assert set(rows) == {"ours", "plain, padded", "plain, by length", *bench_learner.LAYOUTS}
    text = table.read_text()
    for name, row in rows.items():
        assert row["status"] == "ready", f"{name}: {row['reason']}"
        assert row["turns"] == 2
        assert row["grad_norm_off"] < 1e-4
        assert 0 < row["mfu_train"] < 1
        assert 0 < row["extra_memory_mib"] < row["peak_memory_mib"]
        assert f"| {name} |" in text
    assert all(target["tokens_per_s"] > 0 for target in found["targets"])
