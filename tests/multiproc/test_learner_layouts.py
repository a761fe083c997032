"""The same run on every parallel layout: two rollout steps over gloo against one process."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import numpy as np
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from dapo_hpc.learner import sft
from dapo_hpc.learner.checkpoint import Progress
from dapo_hpc.learner.parallel import Layout, connect, disconnect
from dapo_hpc.learner.session import Session, open_session
from dapo_hpc.learner.train import train
from dapo_hpc.run_dir import RunDir
from dapo_hpc.weights.manifest import WeightManifest
from tests.learner_parts import VOCAB, FakeBuffer, make_config, make_model

MODELS = {"tied": ("qwen3", True), "biased": ("qwen2", False)}


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    layout: Layout
    sequence_parallel: bool = False
    memory_saved: bool = False
    """Distributed optimizer and full recompute; neither changes what is trained."""


SINGLE = [Case(f"single-{model}", model, Layout()) for model in MODELS]
TWO = [
    Case("tensor", "tied", Layout(tensor=2)),  # padded vocabulary, norms on q and k
    Case("sequence", "biased", Layout(tensor=2), sequence_parallel=True),
    Case("pipeline", "tied", Layout(pipeline=2)),  # embedding on both stages
    Case("data", "biased", Layout(data=2)),
    Case("context", "tied", Layout(context=2), memory_saved=True),
]
FOUR = [
    Case("tensor-pipeline", "tied", Layout(tensor=2, pipeline=2)),
    Case("sequence-data", "biased", Layout(tensor=2, data=2), sequence_parallel=True),
    Case("pipeline-data", "biased", Layout(pipeline=2, data=2)),
]
FOUR_SHARED = [
    Case("context-data", "biased", Layout(context=2, data=2), memory_saved=True),
    Case("context-sequence", "tied", Layout(context=2, tensor=2), sequence_parallel=True),
]
COMPARED = (
    "learner/loss",
    "learner/grad_norm",
    "learner/entropy",
    "learner/ratio_mean",
    "learner/old_kl",
    "mismatch/mean_diff",
    "mismatch/ess_frac",
)
EPS = 1e-3
"""Of Adam. With 1e-8 a gradient that is 0 but for rounding moves its weight by lr, either way."""
RELATIVE = 2e-4
"""Of these figures: float32, summed in another order over another number of ranks."""


def run_case(case: Case, rank: int, root: Path) -> None:
    """Train two steps; the files of the run are the result."""
    learner = {
        "tensor_parallel": case.layout.tensor,
        "pipeline_parallel": case.layout.pipeline,
        "data_parallel": case.layout.data,
        "context_parallel": case.layout.context,
        "distributed_optimizer": case.memory_saved,
        "recompute": "full" if case.memory_saved else "none",
        "sequence_parallel": case.sequence_parallel,
        "micro_batch_tokens": 48,
    }
    run_section = {"name": case.name, "total_steps": 2}
    config = make_config(
        root / case.model, root, learner=learner, run=run_section, optimizer={"eps": EPS}
    )
    run = RunDir(config.run_dir)
    here = connect(case.layout, rank, root / f"{case.name}.json")
    if rank == 0:
        run.root.mkdir()
    here.barrier()
    session = open_session(run, config, here, FakeBuffer())
    train(session)
    # Load what was just written, by all ranks together.
    assert session.checkpoints.load_newest(session.policy, session.optimizer) is not None
    session.export(run.root / "reloaded")
    fine_tune(session, run.root / "fine-tuned.json")
    here.barrier()
    disconnect()


def fine_tune(session: Session, target: Path) -> None:
    """An update of `dapo sft` on what was trained: loss over all ranks, and norm."""
    here, rng = session.processes, np.random.default_rng(5)
    pairs = [
        (rng.integers(3, VOCAB, n).tolist(), rng.integers(3, VOCAB, 9 - n).tolist())
        for n in (1, 4, 6, 3, 2)
    ]
    micro_batches = sft.pack_batch(session.policy, pairs, 24)
    loss = sft.update(session.policy, session.optimizer, micro_batches, 1e-3)
    total = here.sum_over_ranks(loss.reshape(1) * float(here.reports)).item()
    if here.rank == 0:
        target.write_text(json.dumps({"loss": total}))


def worker(rank: int, cases: list[Case], root: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    for case in cases:
        if rank < case.layout.world:
            run_case(case, rank, Path(root))
    if rank == 0:
        for case in cases:
            read_by_one_rank(case, Path(root))


def read_by_one_rank(case: Case, root: Path) -> None:
    """Load the checkpoint of several ranks on one; what it holds lands in `resharded/`."""
    config = make_config(root / case.model, root, run={"name": case.name})
    run = RunDir(config.run_dir)
    session = open_session(run, config, connect(Layout(), 0, None), FakeBuffer())
    progress = session.checkpoints.load_newest(session.policy, session.optimizer)
    assert progress == Progress(step=2, lineage=1)
    session.export(run.root / "resharded")
    disconnect()


def run_all(cases: list[Case], root: Path) -> None:
    for name, (family, tied) in MODELS.items():
        make_model(root / name, family, tied=tied)
    world = max(case.layout.world for case in cases)
    mp.spawn(worker, args=(SINGLE + cases, str(root)), nprocs=world)


def rows(root: Path, name: str) -> list[dict[str, Any]]:
    lines = (root / name / "metrics.jsonl").read_text().splitlines()
    found = {row["step"]: row for row in map(json.loads, lines) if row["kind"] == "step"}
    return [found[step] for step in (1, 2)]


def check(case: Case, root: Path) -> None:
    for found, expected in zip(
        rows(root, case.name), rows(root, f"single-{case.model}"), strict=True
    ):
        for name in COMPARED:
            assert found[name] == pytest.approx(expected[name], rel=RELATIVE, abs=1e-6), name
        assert found["learner/tokens"] == expected["learner/tokens"]
        assert found["learner/first_ratio_max_diff"] == 0.0
    single = f"single-{case.model}"
    losses = [json.loads((root / n / "fine-tuned.json").read_text()) for n in (case.name, single)]
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=RELATIVE)
    for version in ("v000000-l001", "v000002-l001"):
        for mine, other in zip(
            *(probed(root / n, version) for n in (case.name, single)), strict=True
        ):
            assert mine == pytest.approx(other, rel=RELATIVE)
    require_same_weights(case, root)


def probed(root: Path, version: str) -> list[list[float]]:
    """Log-probs that actors compare with theirs."""
    return [probe.logprobs for probe in WeightManifest.load(root / "weights" / version).probes]


def require_same_weights(case: Case, root: Path) -> None:
    mine = load_file(root / case.name / "model" / "model.safetensors")
    single = load_file(root / f"single-{case.model}" / "model" / "model.safetensors")
    start = load_file(root / case.model / "model.safetensors")
    assert mine.keys() == single.keys()
    for name, value in mine.items():
        moved = (single[name] - start[name]).abs().mean()
        assert (value - single[name]).abs().mean() < 0.01 * moved, name
    for copy in ("reloaded", "resharded"):
        loaded = load_file(root / case.name / copy / "model.safetensors")
        assert all(torch.equal(mine[name], loaded[name]) for name in mine), copy


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layouts")
    run_all(TWO, root)
    return root


@pytest.mark.parametrize("case", TWO, ids=lambda case: case.name)
def test_two_ranks_train_as_one_does(case: Case, two_ranks: Path) -> None:
    check(case, two_ranks)


def test_another_batch_does_not_pass(two_ranks: Path) -> None:
    """Negative control: what `check` compares does tell two trainings apart."""
    first, second = rows(two_ranks, "single-tied")
    assert first["learner/grad_norm"] != pytest.approx(second["learner/grad_norm"], rel=RELATIVE)


@pytest.mark.full
def test_four_ranks_train_as_one_does(tmp_path: Path) -> None:
    run_all(FOUR, tmp_path)
    for case in FOUR:
        check(case, tmp_path)


@pytest.mark.full
def test_four_ranks_that_share_rows_train_as_one_does(tmp_path: Path) -> None:
    run_all(FOUR_SHARED, tmp_path)
    for case in FOUR_SHARED:
        check(case, tmp_path)
