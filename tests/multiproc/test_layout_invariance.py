"""Every layout trains what plain transformers and torch train: losses, gradients, parameters.

Whole rollout steps of the real learner, with ragged mini-batches, truncated responses, tokens
without a log-prob, all denominators and two packings, beside `plain_dapo` in float64 and in
float32.

How far apart may they be? One unit is 2**-24, the rounding of one float32 operation. A gradient
comes through two layers of about eight operations, once forwards, once backwards and once into the
weight, and each of them sums 16 to 48 numbers: 3 * 2 * 8 * 32 = 1536 roundings. With random signs
they add up to their square root, 40 units, and the largest of tens of thousands of such errors is
four times as large: ROUNDINGS. That is the bound at the first update, for a tensor's largest error
as a share of its largest entry; sums over them (loss, norm) and steps of Adam that are smooth in
them (see plain_dapo.EPS) stay below. The float32 twin, the same training by other code, confirms
it: it must keep within the same bound.

What follows carries errors on: a later gradient is that of slightly other parameters. How much that
amplifies is a property of the training and not of the code that runs it, so the twin tells: FACTOR
times its largest error so far is allowed. FACTOR is 4, because both are maxima of random errors,
and a layout rounds its sums over ranks and micro-batches once more.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import plain_dapo
import torch
import torch.multiprocessing as mp
from plain_dapo import Recipe, Trained
from torch import Tensor

from dapo_hpc.config import RunConfig
from dapo_hpc.learner import step as step_module
from dapo_hpc.learner.optimizer import Update
from dapo_hpc.learner.parallel import Layout, connect, disconnect
from dapo_hpc.learner.report import UpdateFigures
from dapo_hpc.learner.session import Session, open_session
from dapo_hpc.records import Group
from dapo_hpc.run_dir import RunDir
from tests.learner_parts import FakeBuffer, make_config, make_model

UNIT = 2.0**-24
ROUNDINGS = 160
FACTOR = 4
SEED = 3
MODELS = {"tied": ("qwen3", True), "biased": ("qwen2", False)}
NORMALIZATIONS = ("global_tokens", "per_prompt", "per_sequence", "per_sequence_const")
THREE = Recipe(steps=3, mini_batches=1, normalization="global_tokens")
SIXTEEN = [Recipe(steps=1, mini_batches=16, normalization=name) for name in NORMALIZATIONS]
NUM_GROUPS = {THREE: 5} | dict.fromkeys(SIXTEEN, 24)
"""24 in 16 mini-batches: some of one group, some of two."""
MANY, FEW = 40, 400
"""Tokens of a micro-batch: one or two responses, or most of a mini-batch."""


@dataclass(frozen=True)
class Case:
    model: str
    recipe: Recipe
    layout: Layout = Layout()
    sequence_parallel: bool = False
    tokens: int = MANY
    mistake: str = ""
    """Negative controls: "doubled", the gradients of rank 1; "decayed", norms and biases."""

    @property
    def name(self) -> str:
        layout = self.layout
        sizes = f"{layout.tensor}{layout.pipeline}{layout.data}{layout.context}"
        words = [self.model, self.recipe.normalization, str(self.recipe.num_updates), sizes]
        words += ["sequence"] * self.sequence_parallel + [str(self.tokens), self.mistake]
        return "-".join(filter(None, words))


LAYOUTS = (
    ("tied", Layout(tensor=2), False),  # a padded row of the vocabulary, norms on q and k
    ("tied", Layout(pipeline=2), False),  # the embedding on both stages
    ("biased", Layout(data=2), False),
    ("biased", Layout(tensor=2), True),
    ("tied", Layout(context=2), False),
)
ONE = [Case(model, THREE, tokens=tokens) for model in MODELS for tokens in (MANY, FEW)]
ONE += [Case("tied", recipe) for recipe in SIXTEEN]
ONE += [Case("biased", recipe) for recipe in SIXTEEN[2:]]  # beside those of TWO
TWO = [Case(m, THREE, layout, sp, n) for m, layout, sp in LAYOUTS for n in (MANY, FEW)]
TWO += [Case(m, r, layout, sp) for (m, layout, sp), r in zip(LAYOUTS, SIXTEEN * 2, strict=False)]
MISTAKES = [
    Case("tied", THREE, Layout(tensor=2), mistake="doubled"),
    Case("biased", THREE, mistake="decayed"),
]
REST_OF_TWO = [
    Case(m, recipe, layout, sp, tokens)
    for m, layout, sp in LAYOUTS
    for recipe in SIXTEEN
    for tokens in (MANY, FEW)
]
FOUR_LAYOUTS = (
    ("tied", Layout(tensor=2, pipeline=2), False),
    ("biased", Layout(tensor=2, data=2), False),
    ("tied", Layout(tensor=2, data=2), True),
    ("biased", Layout(pipeline=2, data=2), False),
    ("biased", Layout(tensor=2, context=2), True),
    ("tied", Layout(pipeline=2, context=2), False),
    ("biased", Layout(data=2, context=2), False),
)
FOUR = [Case(m, THREE, layout, sp, n) for m, layout, sp in FOUR_LAYOUTS for n in (MANY, FEW)]
FOUR += [Case(m, recipe, layout, sp) for m, layout, sp in FOUR_LAYOUTS for recipe in SIXTEEN]


# ------------------------------------------------------------------ what is trained


class RaggedBuffer(FakeBuffer):
    """Every fifth response was cut at the limit; every seventh has a token without a log-prob."""

    def batch(self, step: int) -> list[Group]:
        groups, number = [], 0
        for group in super().batch(step):
            responses = []
            for response in group.responses:
                number += 1
                if number % 5 == 0:
                    response = replace(response, finish_reason="length")
                if number % 7 == 0:
                    holes = response.rollout_logprobs.copy()
                    holes[0] = np.nan
                    response = replace(response, rollout_logprobs=holes)
                responses.append(response)
            groups.append(replace(group, responses=tuple(responses)))
        return groups


def config_of(case: Case, root: Path) -> RunConfig:
    recipe, layout = case.recipe, case.layout
    return make_config(
        root / case.model,
        root,
        run={"name": case.name, "total_steps": recipe.steps, "seed": SEED},
        rollout={
            "prompts_per_step": NUM_GROUPS[recipe],
            "temperature": plain_dapo.TEMPERATURE,
            "max_response_tokens": plain_dapo.MAX_RESPONSE_TOKENS,
        },
        optimizer={
            "lr": plain_dapo.LR,
            "warmup_steps": plain_dapo.WARMUP_STEPS,
            "beta1": plain_dapo.BETA1,
            "beta2": plain_dapo.BETA2,
            "eps": plain_dapo.EPS,
            "weight_decay": plain_dapo.WEIGHT_DECAY,
            "grad_clip": plain_dapo.GRAD_CLIP,
        },
        loss={
            "clip_low": plain_dapo.CLIP_LOW,
            "clip_high": plain_dapo.CLIP_HIGH,
            "dual_clip": plain_dapo.DUAL_CLIP,
            "importance_cap": plain_dapo.CAP,
            "kl_coef": plain_dapo.KL_COEF,
            "normalization": recipe.normalization,
            "overlong_filtering": True,
        },
        learner={
            "mini_batches": recipe.mini_batches,
            "micro_batch_tokens": case.tokens,
            "tensor_parallel": layout.tensor,
            "pipeline_parallel": layout.pipeline,
            "data_parallel": layout.data,
            "context_parallel": layout.context,
            "sequence_parallel": case.sequence_parallel,
            "checkpoint_every": 100,
        },
    )


class Recorder:
    """Stands around a session's updates and notes what each of them did."""

    def __init__(self, session: Session, mistake: str) -> None:
        self.found = Trained([], [], [], [], [])
        self._session, self._mistake = session, mistake
        self._update, self._step = step_module.update, session.optimizer.step
        session.optimizer.step = self.step  # type: ignore[method-assign]
        if mistake == "decayed":
            for group in session.optimizer._adam.param_groups:
                group["wd_mult"] = 1.0

    def update(
        self, session: Session, mini_batch: Any, lr: float, figures: UpdateFigures, *, at: str
    ) -> None:
        before = figures.sums.clone()
        self._update(session, mini_batch, lr, figures, at=at)
        here = session.processes
        mine = (figures.sums - before) * float(here.reports)
        self.found.losses.append(float(here.sum_over_ranks(mine)[0]))

    def step(self, lr: float, *, at: str = "an update") -> Update:
        parameters = list(self._session.policy.module.parameters())
        if self._mistake == "doubled" and self._session.processes.rank == 1:
            for parameter in parameters:
                parameter.main_grad.mul_(2)
        kept = [parameter.data for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.main_grad
        self.found.gradients.append(self._whole())
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data
        update = self._step(lr, at=at)
        self.found.norms.append(update.grad_norm)
        self.found.parameters.append(self._whole())
        return update

    def _whole(self) -> dict[str, Tensor]:
        """The policy's tensors on rank 0. Collective."""
        return {name: t.double().clone() for name, t in self._session.policy.export()}


def run_case(case: Case, rank: int, root: Path) -> None:
    """Train as `train` does, without what it writes for others."""
    address = root / f"{case.name}.json" if case.layout.world > 1 else None
    here = connect(case.layout, rank, address)
    config = config_of(case, root)
    run = RunDir(config.run_dir)
    if rank == 0:
        run.root.mkdir()
    here.barrier()
    session = open_session(run, config, here, RaggedBuffer(NUM_GROUPS[case.recipe]))
    session.resume()
    recorder = Recorder(session, case.mistake)
    ratios = []
    with (
        mock.patch.object(step_module, "update", recorder.update),
        mock.patch.object(Session, "publish"),
        mock.patch.object(Session, "checkpoint", return_value=False),
    ):
        for step in range(1, case.recipe.steps + 1):
            row = step_module.rollout_step(session, step)
            ratios.append(row["learner/first_ratio_max_diff"])
    if rank == 0:
        found = {"trained": recorder.found, "ratios": ratios, "row": row}
        torch.save(found, root / f"{case.name}.found")
    disconnect()


def worker(rank: int, cases: list[Case], root: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    for case in cases:
        if rank < case.layout.world:
            run_case(case, rank, Path(root))


class Results:
    """What the cases found, and the truth beside it."""

    def __init__(self, cases: list[Case], root: Path) -> None:
        self._root = root
        for name, (family, tied) in MODELS.items():
            make_model(root / name, family, tied=tied)
        mp.spawn(worker, args=(cases, str(root)), nprocs=max(case.layout.world for case in cases))
        self.truth = cache(self._truth)
        self.found = cache(self._found)

    def _found(self, case: Case) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(self._root / f"{case.name}.found", weights_only=False)
        return found

    def _truth(self, model: str, recipe: Recipe, dtype: torch.dtype = torch.float64) -> Trained:
        buffer = RaggedBuffer(NUM_GROUPS[recipe])
        batches = [buffer.batch(step) for step in range(1, recipe.steps + 1)]
        return plain_dapo.train(self._root / model, batches, recipe, SEED, dtype)


# ------------------------------------------------------------------ the comparison


@dataclass(frozen=True)
class Errors:
    """Of every update, against the truth; each a share of the size of what it is an error of."""

    loss: list[float]
    norm: list[float]
    gradient: list[float]
    parameter: list[float]


def worst(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Largest difference within each tensor, as a share of its largest entry."""
    assert found.keys() == truth.keys()
    return max(float((found[n] - t).abs().max() / t.abs().max()) for n, t in truth.items())


def errors(found: Trained, truth: Trained) -> Errors:
    losses = zip(found.losses, truth.losses, truth.sizes, strict=True)
    return Errors(
        loss=[abs(a - b) / size for a, b, size in losses],
        norm=[abs(a - b) / b for a, b in zip(found.norms, truth.norms, strict=True)],
        gradient=[worst(a, b) for a, b in zip(found.gradients, truth.gradients, strict=True)],
        parameter=[worst(a, b) for a, b in zip(found.parameters, truth.parameters, strict=True)],
    )


def allowed(twin: Errors) -> list[float]:
    """For each update."""
    so_far = np.maximum.accumulate(np.maximum(twin.gradient, twin.parameter))
    return [max(ROUNDINGS * UNIT, FACTOR * float(error)) for error in so_far]


def require(found: Errors, bounds: list[float]) -> None:
    """Raises AssertionError at the first update that is further off than it may be."""
    for number, bound in enumerate(bounds):
        for kind in ("loss", "norm", "gradient", "parameter"):
            error = getattr(found, kind)[number]
            assert error < bound, f"{kind} of update {number + 1}: {error:.2g} >= {bound:.2g}"


def check(case: Case, results: Results) -> None:
    truth = results.truth(case.model, case.recipe)
    twin = errors(results.truth(case.model, case.recipe, torch.float32), truth)
    found = results.found(case)
    require(errors(found["trained"], truth), allowed(twin))
    assert found["ratios"] == [0.0] * case.recipe.steps


def check_against_single(case: Case, results: Results) -> None:
    """The same packing on one process; where both lie within the bound, twice the bound."""
    single = Case(case.model, case.recipe, tokens=case.tokens)
    truth = results.truth(case.model, case.recipe)
    bounds = allowed(errors(results.truth(case.model, case.recipe, torch.float32), truth))
    one = replace(results.found(single)["trained"], sizes=truth.sizes)
    require(errors(results.found(case)["trained"], one), [2 * bound for bound in bounds])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results([*ONE, *TWO, *MISTAKES], tmp_path_factory.mktemp("invariance"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ONE + TWO, ids=lambda case: case.name)
def test_every_update_is_that_of_plain_torch(case: Case, results: Results) -> None:
    check(case, results)


@pytest.mark.slow
@pytest.mark.parametrize("case", TWO, ids=lambda case: case.name)
def test_two_processes_train_as_one_does(case: Case, results: Results) -> None:
    check_against_single(case, results)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_float32_twin_keeps_the_derived_bound(model: str, results: Results) -> None:
    """At the first update; and what later ones amplify stays far below what mistakes cause."""
    for recipe in (THREE, *SIXTEEN):
        truth = results.truth(model, recipe)
        twin = errors(results.truth(model, recipe, torch.float32), truth)
        assert max(twin.gradient[0], twin.parameter[0]) < ROUNDINGS * UNIT
        assert max(allowed(twin)) < 5e-5


@pytest.mark.slow
def test_a_doubled_gradient_of_one_rank_does_not_pass(results: Results) -> None:
    with pytest.raises(AssertionError, match="norm of update 1"):
        check(MISTAKES[0], results)


@pytest.mark.slow
def test_weight_decay_on_norms_and_biases_does_not_pass(results: Results) -> None:
    with pytest.raises(AssertionError, match="parameter of update 1"):
        check(MISTAKES[1], results)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SIXTEEN, ids=lambda recipe: recipe.normalization)
def test_another_denominator_does_not_pass(recipe: Recipe, results: Results) -> None:
    other = results.truth("tied", SIXTEEN[SIXTEEN.index(recipe) - 1])
    twin = errors(results.truth("tied", recipe, torch.float32), results.truth("tied", recipe))
    mine = errors(results.found(Case("tied", recipe))["trained"], other)
    with pytest.raises(AssertionError, match="of update"):
        require(mine, allowed(twin))


@pytest.mark.full
def test_every_denominator_and_packing_on_two_processes(tmp_path: Path) -> None:
    results = Results(REST_OF_TWO, tmp_path)
    for case in REST_OF_TWO:
        check(case, results)


@pytest.mark.full
def test_four_processes_train_as_one_does(tmp_path: Path) -> None:
    single = {Case(case.model, case.recipe, tokens=case.tokens) for case in FOUR}
    results = Results([*single, *FOUR], tmp_path)
    for case in FOUR:
        check(case, results)
        check_against_single(case, results)
