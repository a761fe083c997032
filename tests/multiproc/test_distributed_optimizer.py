"""The distributed optimizer, recompute, freezing and skipped updates on real gloo ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
from learner_world import (
    Case,
    Connected,
    Whole,
    backward,
    largest_difference,
    same,
    start,
    update,
    whole_state,
)
from safetensors.torch import load_file

from dapo_hpc.learner.model import Policy
from dapo_hpc.learner.optimizer import Optimizer, TooManySkippedUpdates
from dapo_hpc.learner.parallel import Layout, Processes
from dapo_hpc.learner.session import open_session
from dapo_hpc.learner.train import train as train_run
from dapo_hpc.run_dir import RunDir
from tests.learner_parts import FakeBuffer, make_config

TENSOR, PIPELINE, DATA = Layout(tensor=2), Layout(pipeline=2), Layout(data=2)
FREE = 1e9
"""A grad_clip that nothing reaches."""
RELATIVE = 2e-4
"""Between layouts: float32 gradients summed in another order, and Adam's first updates, which
are near lr * sign(gradient), of the larger ones; as in test_learner_layouts."""
FROZEN = ("embedding", "layers.0")
"""The whole first stage of two."""

TRAINED = [
    Case("tied"),
    Case("biased"),
    *(
        Case(model, layout, dtype, distributed=distributed, grad_clip=clip)
        for dtype in ("float32", "bfloat16")
        for model, layout in (("biased", DATA), ("tied", PIPELINE), ("tied", TENSOR))
        for distributed in (False, True)
        for clip in ((FREE, Case("").grad_clip) if layout is DATA else (FREE,))
    ),
]
RECOMPUTED = [
    Case(model, layout, recompute=recompute, sequence_parallel=layout is TENSOR)
    for model, layout in (("tied", Layout()), ("biased", TENSOR), ("tied", PIPELINE))
    for recompute in ("none", "selective", "full")
]
PARTLY = [
    Case(model, layout, distributed=distributed, recompute=recompute, freeze=FROZEN)
    for model in ("tied", "biased")
    for layout, distributed, recompute in (
        (Layout(), False, "none"),
        (Layout(), False, "full"),
        (PIPELINE, False, "full"),
        (PIPELINE, True, "none"),
        (DATA, True, "full"),
    )
]


def train(case: Case, root: Path, here: Processes) -> dict[str, Any]:
    """Three updates."""
    policy, optimizer = case.build(root, here)
    norms = [update(policy, optimizer, seed).grad_norm for seed in range(3)]
    num_numbers = sum(shard.main.numel() for shard in optimizer.shards)
    return {
        "norms": norms,
        "numbers": num_numbers,
        "state": whole_state(policy, optimizer),
    }


def gradients(case: Case, root: Path, here: Processes) -> list[torch.Tensor]:
    """Of one batch, on this rank."""
    policy, optimizer = case.build(root, here)
    backward(policy, optimizer, 0)
    return [parameter.main_grad.clone() for parameter in policy.module.parameters()]


def spoil(policy: Policy, optimizer: Optimizer, rank: int) -> None:
    """A gradient with one number that is none, on the last rank alone.

    Of the layouts below that is a number of the rank's own, of its copy of the tied embedding, and
    of a norm that both tensor-parallel ranks hold.
    """
    backward(policy, optimizer, 0)
    if rank == 1:
        optimizer.shards[-1].parameter.main_grad.view(-1)[optimizer.shards[-1].start] = float("nan")


def skip(case: Case, root: Path, here: Processes) -> dict[str, Any]:
    """An update, a spoilt one, another; then spoilt ones to the limit."""
    policy, optimizer = case.build(root, here)
    update(policy, optimizer, 0)
    before = whole_state(policy, optimizer)
    spoil(policy, optimizer, here.rank)
    skipped = optimizer.step(1e-2, at="step 7, update 2")
    after = whole_state(policy, optimizer)
    went_on = update(policy, optimizer, 1)
    found = {"before": before, "skipped": skipped, "after": after, "went on": went_on}
    found["counted"] = (optimizer.num_updates, optimizer.num_skipped_in_a_row)
    found["end"] = whole_state(policy, optimizer)
    try:
        for _ in range(5):
            spoil(policy, optimizer, here.rank)
            optimizer.step(1e-2, at="step 8, update 3")
    except TooManySkippedUpdates as stop:
        found["stop"] = str(stop)
    found["skipped in a row"] = optimizer.num_skipped_in_a_row
    return found


def whole_run(learner: dict[str, Any], root: Path, here: Processes) -> None:
    """Two rollout steps as a config says, resumed once; the model lands in the run directory."""
    sizes = {"data_parallel": here.layout.data, "micro_batch_tokens": 48, "checkpoint_every": 1}
    name = "-".join(["run", *learner])
    for total_steps in (1, 2):
        config = make_config(
            root / "biased",
            root,
            run={"name": name, "total_steps": total_steps},
            learner={**sizes, **learner},
            optimizer={"grad_clip": FREE},
            loss={"kl_coef": 0.1},
        )
        run = RunDir(config.run_dir)
        if here.rank == 0:
            run.root.mkdir(exist_ok=True)
        here.barrier()
        train_run(open_session(run, config, here, FakeBuffer()))


RUNS: list[dict[str, Any]] = [
    {"threads": 1},
    {"distributed_optimizer": True, "async_checkpoint": True, "recompute": "full"},
]
SKIPPING = [
    Case("biased", DATA, distributed=True),
    Case("tied", PIPELINE),
    Case("tied", TENSOR),
]


def everything(root: Path, rank: int) -> None:
    jobs: list[tuple[Any, str, list[Case]]] = [
        (train, "train", TRAINED),
        (gradients, "gradients", RECOMPUTED),
        (train, "partly", PARTLY),
        (skip, "skip", SKIPPING),
    ]
    for job, kind, cases in jobs:
        for case in cases:
            with Connected(case.layout, root, rank, f"{kind}-{case.name}") as here:
                if here is not None:
                    torch.save(job(case, root, here), root / f"{kind}-{case.name}-{rank}.pt")
    for learner in RUNS:
        with Connected(DATA, root, rank, "-".join(learner)) as here:
            assert here is not None
            whole_run(learner, root, here)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("optimizer")
    start(everything, root, 2)
    return root


def result(root: Path, kind: str, case: Case, rank: int = 0) -> Any:
    return torch.load(root / f"{kind}-{case.name}-{rank}.pt", weights_only=False)


def by_name(case: Case) -> str:
    return case.name


# ------------------------------------------------------------------ the distributed optimizer


DISTRIBUTED = [case for case in TRAINED if case.distributed]


@pytest.mark.parametrize("case", DISTRIBUTED, ids=by_name)
def test_it_does_what_the_whole_optimizer_does(case: Case, two_ranks: Path) -> None:
    """Sums over two ranks have one order, so only a norm that clips may differ in its last bits."""
    mine = result(two_ranks, "train", case)
    whole = result(two_ranks, "train", replace(case, distributed=False))
    assert mine["norms"] == pytest.approx(whole["norms"], rel=1e-6)
    if case.grad_clip == FREE:
        assert same(mine["state"], whole["state"])
    else:
        assert min(mine["norms"]) > case.grad_clip
        for kind in ("exp_avg/0", "exp_avg_sq/0", "main/0"):
            limit = 1e-5 if case.dtype == "float32" else 2**-7  # one bit of the leading part
            assert largest_difference(mine["state"][kind], whole["state"][kind]) < limit, kind


@pytest.mark.parametrize("case", DISTRIBUTED, ids=by_name)
def test_data_parallel_ranks_share_the_state(case: Case, two_ranks: Path) -> None:
    numbers = [result(two_ranks, "train", case, rank)["numbers"] for rank in (0, 1)]
    whole = result(two_ranks, "train", replace(case, distributed=False))["numbers"]
    if case.layout is DATA:
        assert sum(numbers) == whole
        assert max(numbers) < 0.6 * whole
    else:
        assert numbers[0] == whole


@pytest.mark.parametrize(
    "case", [case for case in DISTRIBUTED if case.dtype == "float32"], ids=by_name
)
def test_norms_are_those_of_one_process(case: Case, two_ranks: Path) -> None:
    single = result(two_ranks, "train", Case(case.model))
    mine = result(two_ranks, "train", case)
    assert mine["norms"][0] == pytest.approx(single["norms"][0], rel=1e-5)
    if case.grad_clip != FREE:
        assert mine["norms"] == pytest.approx(single["norms"], rel=RELATIVE)


def test_a_run_by_config_ends_with_the_same_bits(two_ranks: Path) -> None:
    ends = [
        load_file(two_ranks / "-".join(["run", *learner]) / "model" / "model.safetensors")
        for learner in RUNS
    ]
    start = load_file(two_ranks / "biased" / "model.safetensors")
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)
    assert not any(torch.equal(ends[0][name], start[name]) for name in start)


# ------------------------------------------------------------------ recompute


@pytest.mark.parametrize(
    "case", [case for case in RECOMPUTED if case.recompute != "none"], ids=by_name
)
def test_recompute_gives_the_same_bits(case: Case, two_ranks: Path) -> None:
    for rank in range(case.layout.world):
        kept = result(two_ranks, "gradients", replace(case, recompute="none"), rank)
        mine = result(two_ranks, "gradients", case, rank)
        assert all(torch.equal(a, b) for a, b in zip(mine, kept, strict=True))
        assert any(gradient.abs().max() > 0 for gradient in kept)


# ------------------------------------------------------------------ freezing


def is_frozen(name: str) -> bool:
    return "embed_tokens" in name or "layers.0." in name


@pytest.mark.parametrize("case", PARTLY, ids=by_name)
def test_what_is_frozen_stays_and_the_rest_trains(case: Case, two_ranks: Path) -> None:
    start: Whole = load_file(two_ranks / case.model / "model.safetensors")
    single = result(two_ranks, "partly", Case(case.model, freeze=FROZEN))
    mine = result(two_ranks, "partly", case)
    found = mine["state"]["parameters"]
    for name, value in found.items():
        assert torch.equal(value, start[name]) == is_frozen(name), name
    assert mine["norms"] == pytest.approx(single["norms"], rel=RELATIVE)
    for name, value in found.items():
        expected = single["state"]["parameters"][name]
        moved = (expected - start[name]).abs().mean()
        assert (value - expected).abs().mean() <= 0.01 * moved, name


def test_frozen_parameters_have_no_state(two_ranks: Path) -> None:
    everything = result(two_ranks, "train", Case("biased"))["numbers"]
    partly = result(two_ranks, "partly", Case("biased", freeze=FROZEN))
    frozen = sum(v.numel() for k, v in partly["state"]["parameters"].items() if is_frozen(k))
    assert partly["numbers"] == everything - frozen > 0
    stages = [
        result(two_ranks, "partly", Case("biased", PIPELINE, distributed=True, freeze=FROZEN), rank)
        for rank in (0, 1)
    ]
    assert [stage["numbers"] for stage in stages] == [0, partly["numbers"]]


# ------------------------------------------------------------------ skipped updates


@pytest.mark.parametrize("case", SKIPPING, ids=by_name)
def test_one_bad_number_on_one_rank_skips_the_update_on_all(case: Case, two_ranks: Path) -> None:
    for rank in (0, 1):
        found = result(two_ranks, "skip", case, rank)
        assert found["skipped"].is_skipped
        assert not torch.isfinite(torch.tensor(found["skipped"].grad_norm))
        assert same(found["before"], found["after"]), "parameters and moments stay as they are"
        assert not found["went on"].is_skipped
        assert found["counted"] == (2, 0)
        assert found["skipped in a row"] == 3
        assert found["stop"].startswith("step 8, update 3: the gradient norm is nan")
        assert "optimizer.max_skipped_updates = 3" in found["stop"]
    first = result(two_ranks, "skip", case)  # whole tensors are on rank 0
    assert not same(first["after"], first["end"]), "training goes on"
