"""The fused loss under Megatron's own DistributedDataParallel and schedules, on gloo.

The gradient of the output weight is written in the forward pass, beside everything Megatron does
with it: sums over micro-batches, hooks that start reductions early, embeddings that two layers or
two stages share. Truth is transformers in float64 with the loss written out and plain autograd.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
import torch.multiprocessing as mp
import transformers
from torch import Tensor

from dapo_hpc.config import LossSection
from dapo_hpc.learner import model as model_module
from dapo_hpc.learner.forward import Row, forward_backward_dapo, log_probs, row
from dapo_hpc.learner.head import LossInputs
from dapo_hpc.learner.model import Policy
from dapo_hpc.learner.parallel import Layout, Processes, connect, disconnect
from dapo_hpc.weights.source import SafetensorsSource
from dapo_kernels.gradients import WeightGradient
from tests.learner_parts import VOCAB, make_model

MODELS = {"tied": ("qwen3", True), "biased": ("qwen2", False)}
TEMPERATURE = 0.8
RULE = LossSection(clip_low=0.2, clip_high=0.28, dual_clip=1.5, importance_cap=1.5, kl_coef=0.1)
LENGTHS = ((7, 12, 5), (20,), (3, 9, 8, 6), (11, 13))
"""Of the sequences of each micro-batch, prompts included; even sums, as sequence parallelism
needs. Of the last micro-batch nothing trains."""
COUNTS = ("tokens", "clipped_high", "clipped_low", "dual_clipped")


@dataclass(frozen=True)
class Case:
    model: str
    layout: Layout
    sequence_parallel: bool = False
    overlap: bool = False
    """Reductions over the data-parallel ranks start within the backward pass."""
    is_doubled: bool = False
    """Negative control: the gradient in main_grad is returned as well."""

    @property
    def name(self) -> str:
        sizes = f"{self.layout.tensor}{self.layout.pipeline}{self.layout.data}"
        marks = ("sequence", self.sequence_parallel), ("overlap", self.overlap)
        marks += (("doubled", self.is_doubled),)
        return "-".join([self.model, sizes, *(mark for mark, is_on in marks if is_on)])


DOUBLED = Case("tied", Layout(), is_doubled=True)
ONE = [Case(model, Layout(), overlap=overlap) for model in MODELS for overlap in (False, True)]
TWO = [
    Case(model, layout, overlap=overlap)
    for model in MODELS  # tied: one rank, two tensor-parallel ranks, two stages
    for layout in (Layout(tensor=2), Layout(pipeline=2), Layout(data=2))
    for overlap in (False, True)
]
TWO += [Case(model, Layout(tensor=2), sequence_parallel=True) for model in MODELS]
FOUR = [
    Case("tied", Layout(pipeline=2, data=2), overlap=True),
    Case("tied", Layout(tensor=2, pipeline=2), sequence_parallel=True),
    Case("biased", Layout(tensor=2, data=2), sequence_parallel=True, overlap=True),
]


# ------------------------------------------------------------------ the batch and the truth


def logprobs_of(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    """[T] of each micro-batch by transformers, one sequence at a time; with gradient."""
    found = []
    for tokens, targets, lengths in zip(batch["tokens"], batch["targets"], LENGTHS, strict=True):
        parts = []
        for ids, wanted in zip(tokens.split(lengths), targets.split(lengths), strict=True):
            logits = model(ids[None]).logits[0] / TEMPERATURE
            parts.append(torch.log_softmax(logits, -1).gather(1, wanted[:, None])[:, 0])
        found.append(torch.cat(parts))
    return found


def make_batch(model: Any) -> dict[str, Any]:
    """What every layout is given. Old, engine's and reference log-probs lie around the current."""
    rng = np.random.default_rng(0)
    sizes = [sum(lengths) for lengths in LENGTHS]
    draw = [torch.from_numpy(rng.integers(3, VOCAB, (2, size))) for size in sizes]
    batch: dict[str, Any] = {"tokens": [d[0] for d in draw], "targets": [d[1] for d in draw]}
    with torch.no_grad():
        current = [logprobs.float() for logprobs in logprobs_of(model, batch)]
    for name, spread in (("old", 0.6), ("rollout", 0.5), ("ref", 0.3)):
        noise = [torch.from_numpy(rng.normal(0, spread, size)).float() for size in sizes]
        batch[name] = [c + n for c, n in zip(current, noise, strict=True)]
    masks = [torch.from_numpy(rng.random(size) < 0.6) for size in sizes]
    masks[-1][:] = False
    batch["mask"] = masks
    batch["advantages"] = [torch.from_numpy(rng.normal(0, 1.5, size)).float() for size in sizes]
    num_trained = sum(int(mask.sum()) for mask in masks)
    batch["weights"] = [mask.float() / num_trained for mask in masks]
    return batch


def plain_losses(logprobs: Tensor, batch: dict[str, Any], number: int) -> tuple[Tensor, Tensor]:
    """The objective's terms written out, one for each trained token; and COUNTS."""
    mask = batch["mask"][number]
    columns = ("old", "rollout", "ref", "advantages", "weights")
    old, rollout, ref, advantages, weights = (batch[n][number][mask].double() for n in columns)
    now = logprobs[mask].double()
    ratio = (now - old).exp()
    low, high, bound = 1 - RULE.clip_low, 1 + RULE.clip_high, RULE.dual_clip
    losses = -torch.minimum(advantages * ratio, advantages * ratio.clamp(low, high))
    is_bad = advantages < 0
    losses = torch.where(is_bad, torch.minimum(losses, -advantages * bound), losses)
    importance = (old - rollout).exp().clamp(max=RULE.importance_cap)
    kl = (ref - now).exp() - (ref - now) - 1
    terms = weights * (importance * losses + RULE.kl_coef * kl)
    flags = (ratio > 0, ~is_bad & (ratio > high), is_bad & (ratio < low), is_bad & (ratio > bound))
    return terms, torch.stack([flag.sum() for flag in flags])


def truth(directory: Path, batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Loss, the size of its terms, COUNTS and all gradients by plain autograd."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).to(dtype)
    parts = [
        plain_losses(logprobs, batch, number)
        for number, logprobs in enumerate(logprobs_of(model, batch))
    ]
    terms = torch.cat([terms for terms, _ in parts])
    terms.sum().backward()  # type: ignore[no-untyped-call]
    return {
        "loss": float(terms.sum()),
        "size": float(terms.abs().sum()),
        "counts": sum(counts for _, counts in parts).tolist(),
        "gradients": {name: p.grad.double() for name, p in model.named_parameters()},
    }


# ------------------------------------------------------------------ the learner's processes


@contextmanager
def altered(case: Case) -> Iterator[None]:
    """Megatron's DDP with or without overlap; and the wrong kernel where one is wanted."""
    real = model_module.DistributedDataParallelConfig

    def config(**settings: Any) -> Any:
        return real(**{**settings, "overlap_grad_reduce": case.overlap})

    finish = WeightGradient.finish

    def doubled(self: WeightGradient, upstream: Tensor | None = None) -> Tensor:
        finish(self, upstream)
        return self._total.clone()

    with (
        mock.patch.object(model_module, "DistributedDataParallelConfig", config),
        mock.patch.object(WeightGradient, "finish", doubled if case.is_doubled else finish),
    ):
        yield


def build(case: Case, here: Processes, root: Path) -> Policy:
    policy = Policy(
        root / case.model,
        here,
        dtype=torch.float32,
        temperature=TEMPERATURE,
        sequence_parallel=case.sequence_parallel,
    )
    policy.load(SafetensorsSource(root / case.model))
    assert policy.ddp.ddp_config.overlap_grad_reduce is case.overlap
    return policy


def rows_of(policy: Policy, batch: dict[str, Any], numbers: list[int]) -> list[Row]:
    return [
        row(
            policy,
            batch["tokens"][n].numpy(),
            batch["targets"][n].numpy(),
            np.array(LENGTHS[n]),
            is_wanted=batch["mask"][n].numpy(),
        )
        for n in numbers
    ]


def inputs_of(batch: dict[str, Any], number: int, old: Tensor | None = None) -> LossInputs:
    return LossInputs(
        old_logprobs=batch["old"][number] if old is None else old,
        rollout_logprobs=batch["rollout"][number],
        ref_logprobs=batch["ref"][number],
        advantages=batch["advantages"][number],
        token_weights=batch["weights"][number],
        rule=RULE,
    )


def run_case(case: Case, rank: int, root: Path) -> None:
    """Score, train on what was scored, train on the batch; rank 0 writes what came of it."""
    here = connect(case.layout, rank, root / f"{case.name}.json")
    batch = torch.load(root / f"{case.model}.pt")
    numbers = list(range(len(LENGTHS)))[here.data_rank :: case.layout.data]
    with altered(case):
        policy = build(case, here, root)
        rows = rows_of(policy, batch, numbers)
        scored = [logprobs for logprobs, _ in log_probs(policy, rows)]
        policy.ddp.zero_grad_buffer()
        first = forward_backward_dapo(
            policy, rows, lambda i: inputs_of(batch, numbers[i], scored[i])
        )
        policy.ddp.zero_grad_buffer()
        second = forward_backward_dapo(policy, rows, lambda i: inputs_of(batch, numbers[i]))
    ratio = max((float(stats.ratio_max_diff) for _, stats in first), default=0.0)
    sums = torch.zeros(1 + len(COUNTS), dtype=torch.float64)
    for loss, stats in second if here.reports else ():
        sums += torch.stack([loss, *(getattr(stats, name) for name in COUNTS)]).double()
    sums = here.sum_over_ranks(sums)
    for parameter in policy.module.parameters():
        parameter.data = parameter.main_grad.clone()
    found = {
        "ratio_max_diff": float(here.max_over_ranks(torch.tensor([ratio]))),
        "loss": float(sums[0]),
        "counts": sums[1:].tolist(),
        "gradients": dict(policy.export()),
    }
    if here.rank == 0:
        torch.save(found, root / f"{case.name}.found")
    if case.layout == Layout() and not case.overlap:
        refused(policy, rows, batch)
    disconnect()


def refused(policy: Policy, rows: list[Row], batch: dict[str, Any]) -> None:
    """Whatever scales the loss after the head raises, instead of training with half a gradient."""
    scales = {"calculate_per_token_loss": False, "grad_scale_func": lambda loss: 2 * loss}
    for name, value in scales.items():
        with (
            mock.patch.object(policy.config, name, value),
            pytest.raises(ValueError, match=r"upstream gradient is (0\.25|2\.0), expected 1"),
        ):
            forward_backward_dapo(policy, rows, lambda i: inputs_of(batch, i))


def worker(rank: int, cases: list[Case], root: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    for case in cases:
        if rank < case.layout.world:
            run_case(case, rank, Path(root))


def run_all(cases: list[Case], root: Path) -> dict[str, dict[str, Any]]:
    """What the cases found; beside it, by model, the truth and a float32 reference."""
    found: dict[str, dict[str, Any]] = {}
    for name, (family, tied) in MODELS.items():
        model = make_model(root / name, family, tied=tied)
        batch = make_batch(model.double())
        torch.save(batch, root / f"{name}.pt")
        found[name] = truth(root / name, batch, torch.float64)
        found[f"{name}-float32"] = truth(root / name, batch, torch.float32)
    world = max(case.layout.world for case in cases)
    mp.spawn(worker, args=(cases, str(root)), nprocs=world)
    return found | {case.name: torch.load(root / f"{case.name}.found") for case in cases}


# ------------------------------------------------------------------ the tests


def error(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference within each tensor, as a share of its largest entry."""
    assert gradients.keys() == expected.keys()
    return {
        name: float((gradients[name] - value).abs().max() / value.abs().max())
        for name, value in expected.items()
    }


def check(case: Case, found: dict[str, dict[str, Any]]) -> None:
    mine, expected = found[case.name], found[case.model]
    reference = found[f"{case.model}-float32"]
    assert mine["counts"] == expected["counts"]
    assert min(mine["counts"]) > 0, "each rule applies to some token"
    # Sums of a few hundred float32 products, in another order on every layout.
    allowed = 4 * max(error(reference["gradients"], expected["gradients"]).values())
    assert abs(mine["loss"] - expected["loss"]) < allowed * expected["size"]
    errors = error(mine["gradients"], expected["gradients"])
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < allowed, worst


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run_all([*ONE, DOUBLED, *TWO], tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("case", ONE + TWO, ids=lambda case: case.name)
def test_loss_and_every_gradient_are_those_of_plain_autograd(
    case: Case, found: dict[str, dict[str, Any]]
) -> None:
    check(case, found)


@pytest.mark.parametrize("case", ONE + TWO, ids=lambda case: case.name)
def test_trained_log_probs_have_the_bits_of_scored_ones(
    case: Case, found: dict[str, dict[str, Any]]
) -> None:
    assert found[case.name]["ratio_max_diff"] == 0.0


def test_a_gradient_that_is_returned_as_well_does_not_pass(
    found: dict[str, dict[str, Any]],
) -> None:
    """Negative control: with tied embeddings Megatron adds what backward returns."""
    with pytest.raises(AssertionError, match="embed_tokens"):
        check(DOUBLED, found)


@pytest.mark.full
def test_four_ranks(tmp_path: Path) -> None:
    found = run_all(FOUR, tmp_path)
    for case in FOUR:
        check(case, found)
        assert found[case.name]["ratio_max_diff"] == 0.0
