"""A learner's memory on several ranks, planned, against the same ranks over gloo."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch.multiprocessing as mp

from dapo_hpc.config import RunConfig
from dapo_hpc.learner.parallel import Layout, connect, disconnect
from dapo_hpc.plan.memory import RankMemory, learner_memory
from tests.unit.plan.measuring import (
    PER_TOKEN_VECTORS,
    TOKENS,
    agrees,
    architecture,
    build_policy,
    held_bytes,
    run_config,
    update_peak,
    write_model,
)

pytestmark = pytest.mark.full
RANKS = 2
PASSES = 8
HELD_BY_GLOO = 512
"""Bytes a token: its threads let go of the rows of a collective, hidden states of 128 float32, only
when they get to it; rows that they received may have been allocated before the profiler looked."""
BUCKET_ELEMENTS = 128
"""The distributed optimizer fills each buffer up to a multiple of it, and each parameter to 64."""


@dataclass(frozen=True)
class Case:
    name: str
    learner: dict[str, Any]
    family: str = "qwen2"
    tied: bool = False
    dtype: str = "float32"
    rows: int = 1
    """Micro-batches of an update."""
    wrong: dict[str, Any] = field(default_factory=dict)
    """Another layout, whose plan must not agree."""

    def config(self, root: Path) -> RunConfig:
        return run_config(root / self.name, self.dtype, rows=self.rows, **self.learner)

    @property
    def layout(self) -> Layout:
        get = self.learner.get
        return Layout(
            get("tensor_parallel", 1), get("pipeline_parallel", 1), get("data_parallel", 1)
        )


TENSOR = {"tensor_parallel": 2}
ROWS = {**TENSOR, "sequence_parallel": True}
STAGES = {"pipeline_parallel": 2}
CASES = [
    Case("tensor", TENSOR, wrong={"sequence_parallel": True}),
    Case("tensor-full", {**TENSOR, "recompute": "full"}, "qwen3", tied=True),
    Case("rows", ROWS, wrong={"sequence_parallel": False}),
    Case("rows-full", {**ROWS, "recompute": "full"}, wrong={"recompute": "none"}),
    # Two micro-batches are in flight on the first stage, one on the last.
    Case("stages", STAGES, rows=4, wrong={"pipeline_parallel": 1}),
    Case("stages-full", {**STAGES, "recompute": "full"}, "qwen3", tied=True, rows=4),
    Case(
        "shards",
        {"data_parallel": 2, "distributed_optimizer": True},
        dtype="bfloat16",
        wrong={"distributed_optimizer": False},
    ),
]


def measure(rank: int, root: str) -> None:
    """One process: every case in turn; what it held and needed lands in a file."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for case in CASES:
        config = case.config(Path(root))
        here = connect(case.layout, rank, Path(root) / f"{case.name}-ranks.json")
        policy = build_policy(config, here)
        peak = update_peak(policy, config, rows=case.rows, passes=PASSES)
        found = {"held": held_bytes(policy), "peak": peak, "stage": here.pipeline_rank}
        (Path(root) / f"{case.name}-{rank}.json").write_text(json.dumps(found))
        here.barrier()
        disconnect()


def agrees_with(plan: RankMemory, peak: int) -> bool:
    tolerance = (PER_TOKEN_VECTORS + HELD_BY_GLOO) * TOKENS / peak
    assert tolerance < 0.09, "8 % in the smallest case, 2 % in most"
    return agrees(plan.activations + plan.passing, peak, tolerance)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    for case in CASES:
        write_model(root / case.name, case.family, tie_word_embeddings=case.tied, vocab_size=501)
    mp.spawn(measure, args=(str(root),), nprocs=RANKS)
    return root


def planned(case: Case, root: Path, **changed: Any) -> list[RankMemory]:
    config = case.config(root)
    learner = config.learner.model_copy(update=changed)
    config = config.model_copy(update={"learner": learner})
    return learner_memory(architecture(config), config)


def found(case: Case, root: Path) -> list[dict[str, Any]]:
    return [json.loads((root / f"{case.name}-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_stays_is_planned_to_the_byte(case: Case, measured: Path) -> None:
    for rank in found(case, measured):
        plan = planned(case, measured)[rank["stage"]]
        weights, gradients, optimizer = rank["held"]
        assert weights == plan.weights
        if not case.learner.get("distributed_optimizer"):
            assert (gradients, optimizer) == (plan.gradients, plan.optimizer)


def test_shards_of_the_optimizer_add_up(measured: Path) -> None:
    """Which rank has more of the odd end is Megatron's choice; the buffers are padded."""
    (case,) = (case for case in CASES if case.name == "shards")
    (plan,) = planned(case, measured)
    ranks = [rank["held"] for rank in found(case, measured)]
    assert abs(sum(optimizer for _, _, optimizer in ranks) - 2 * plan.optimizer) <= 1
    padding = 4 * (BUCKET_ELEMENTS + 64 * 100)
    for _, gradients, optimizer in ranks:
        assert 0 <= gradients - plan.gradients < padding
        assert abs(optimizer - plan.optimizer) < 12 * BUCKET_ELEMENTS * 100
    (whole,) = planned(case, measured, **case.wrong)
    assert ranks[0][2] < 0.6 * whole.optimizer


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_peak_of_an_update(case: Case, measured: Path) -> None:
    for rank in found(case, measured):
        plan = planned(case, measured)[rank["stage"]]
        assert agrees_with(plan, rank["peak"]), (plan, rank)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.wrong and c.name != "shards"], ids=lambda case: case.name
)
def test_the_plan_of_another_layout_is_noticed(case: Case, measured: Path) -> None:
    """Negative controls: sequence parallelism forgotten, recompute not planned, one stage."""
    first = found(case, measured)[0]
    wrong = planned(case, measured, **case.wrong)[0]
    assert not agrees_with(wrong, first["peak"])


def test_a_micro_batch_too_few_in_flight_is_noticed(measured: Path) -> None:
    (case,) = (case for case in CASES if case.name == "stages")
    plan = planned(case, measured)[0]
    fewer = replace(plan, activations=plan.activations // 2)
    first = found(case, measured)[0]
    assert not agrees_with(fewer, first["peak"])
