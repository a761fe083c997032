"""Loss and gradients of a mini-batch are a property of the mini-batch, not of how it is cut up."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_batches import MAX_RESPONSE_TOKENS, VOCAB, Batch, random_batch
from torch import Tensor

from dapo_hpc.config import AdvantageSection
from dapo_hpc.learner.advantage import group_advantages
from dapo_hpc.learner.correction import non_finite_tokens
from dapo_hpc.learner.packing import (
    Member,
    MicroBatch,
    Normalization,
    pack,
    plan_step,
    token_weights,
    trained_tokens,
)
from dapo_kernels import linear_dapo_loss, linear_logprob

CLIP_LOW, CLIP_HIGH, CAP, LONGEST = 0.2, 0.28, 2.0, 16
NORMALIZATIONS: tuple[Normalization, ...] = (
    "global_tokens",
    "per_prompt",
    "per_sequence",
    "per_sequence_const",
)


class Model(torch.nn.Module):
    """Float64; hidden states depend on the token, its position and the tokens before it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding, self.position, self.weight = (
            torch.nn.Parameter(torch.randn(n, 6, generator=generator, dtype=torch.float64))
            for n in (VOCAB, LONGEST, VOCAB)
        )
        self.old_weight = self.weight.detach() + 0.2 * torch.randn(
            VOCAB, 6, generator=generator, dtype=torch.float64
        )

    def hidden(self, ids: Tensor, positions: Tensor, bounds: list[int]) -> Tensor:
        embedded = self.embedding[ids] + self.position[positions]
        pieces = embedded.split([b - a for a, b in zip(bounds, bounds[1:], strict=False)])
        return torch.tanh(torch.cat([piece.cumsum(0) for piece in pieces]))


def micro_batch_loss(model: Model, micro: MicroBatch) -> Tensor:
    """The learner's way: the same places scored and trained, in small chunks."""
    hidden = model.hidden(micro.token_ids, micro.positions, micro.cu_seqlens.tolist())
    layout: dict[str, Any] = {
        "temperature": 0.9,
        "rows": micro.loss_mask.nonzero().squeeze(1),
        "chunk_tokens": 5,
    }
    old, _ = linear_logprob(hidden.detach(), model.old_weight, micro.targets, **layout)
    loss, _ = linear_dapo_loss(
        hidden,
        model.weight,
        micro.targets,
        old,
        micro.rollout_logprobs.double(),
        micro.advantages.double(),
        micro.token_weights.double(),
        clip_low=CLIP_LOW,
        clip_high=CLIP_HIGH,
        importance_cap=CAP,
        **layout,
    )
    return loss


def batch_numbers(
    batch: Batch, normalization: Normalization, overlong_filtering: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and weights [N, G] of a train batch that is one mini-batch."""
    everyone = list(np.ndindex(batch.shape))
    counts = trained_tokens(
        batch.summaries,
        overlong_filtering=overlong_filtering,
        dropped=non_finite_tokens(everyone, batch.groups, batch.shape),
    )
    advantages = [
        group_advantages(np.array(summary.rewards), AdvantageSection())
        for summary in batch.summaries
    ]
    weights = token_weights(counts, normalization, max_response_tokens=MAX_RESPONSE_TOKENS)
    return np.array(advantages), weights


def loss_and_gradients(
    batch: Batch,
    micro_batches: list[tuple[Member, ...]],
    numbers: tuple[np.ndarray, np.ndarray],
    multiple: int = 1,
) -> list[Tensor]:
    """Summed over micro-batches, each with its own backward, as over ranks."""
    model = Model()
    total = torch.zeros((), dtype=torch.float64)
    for members in micro_batches:
        micro = pack(
            members, batch.groups, advantages=numbers[0], weights=numbers[1], multiple=multiple
        )
        loss = micro_batch_loss(model, micro)
        loss.backward()
        total += loss.detach()
    return [total, *(p.grad for p in model.parameters() if p.grad is not None)]


def planned(batch: Batch, budget: int, data_parallel: int, seed: int) -> list[tuple[Member, ...]]:
    plan = plan_step(
        batch.summaries,
        mini_batches=1,
        micro_batch_tokens=budget,
        data_parallel=data_parallel,
        seed=seed,
    )
    return [micro for rank in plan.mini_batches[0].ranks for micro in rank]


# Sums of at most a few hundred float64 terms of size 1: 1e-13 is some thousand roundings.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-13}


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@settings(max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(2, 4), st.integers(0, 10**6)),
    budget=st.integers(1, 80),
    data_parallel=st.integers(1, 3),
    multiple=st.integers(1, 4),
    shuffle=st.randoms(use_true_random=False),
    overlong_filtering=st.booleans(),
)
def test_any_cut_gives_the_same_update(
    normalization: Normalization,
    shape: tuple[int, int, int],
    budget: int,
    data_parallel: int,
    multiple: int,
    shuffle: object,
    overlong_filtering: bool,
) -> None:
    batch = random_batch(*shape, non_finite_frac=0.1)
    numbers = batch_numbers(batch, normalization, overlong_filtering)
    whole = loss_and_gradients(batch, [tuple(np.ndindex(batch.shape))], numbers)
    micro_batches = planned(batch, budget, data_parallel, seed=budget)
    micro_batches = [tuple(shuffle.sample(micro, len(micro))) for micro in micro_batches]  # type: ignore[attr-defined]
    shuffle.shuffle(micro_batches)  # type: ignore[attr-defined]
    cut = loss_and_gradients(batch, micro_batches, numbers, multiple)
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def literal_loss(batch: Batch, normalization: Normalization) -> float:
    """Response by response in plain torch, the denominators as means of means."""
    model = Model()
    groups: list[list[list[float]]] = []
    for group in batch.groups.values():
        rewards = np.array([response.reward for response in group.responses])
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        groups.append([])
        for response, advantage in zip(group.responses, advantages.tolist(), strict=True):
            ids = torch.from_numpy(np.concatenate((group.prompt.token_ids, response.token_ids)))
            embedded = model.embedding[ids] + model.position[: len(ids)]
            hidden = torch.tanh(embedded.cumsum(0))[len(group.prompt.token_ids) - 1 : -1]
            picks = torch.arange(len(response.token_ids)), torch.from_numpy(response.token_ids)
            new, old = (
                torch.log_softmax(hidden @ weight.t() / 0.9, -1)[picks].tolist()
                for weight in (model.weight, model.old_weight)
            )
            losses = []
            for now, then, engine in zip(new, old, response.rollout_logprobs.tolist(), strict=True):
                if not np.isfinite(engine):
                    continue
                ratio = float(np.exp(now - then))
                cut = min(max(ratio, 1 - CLIP_LOW), 1 + CLIP_HIGH)
                truncated = min(float(np.exp(then - engine)), CAP)
                losses.append(-truncated * min(ratio * advantage, cut * advantage))
            groups[-1].append(losses)
    return combine(groups, normalization)


def combine(groups: list[list[list[float]]], normalization: Normalization) -> float:
    groups = [[losses for losses in group if losses] for group in groups]
    responses = [losses for group in groups for losses in group]
    if normalization == "global_tokens":
        return fmean(loss for losses in responses for loss in losses)
    if normalization == "per_prompt":
        return fmean(fmean(x for losses in group for x in losses) for group in groups if group)
    if normalization == "per_sequence":
        return fmean(fmean(losses) for losses in responses)
    return fmean(sum(losses) / MAX_RESPONSE_TOKENS for losses in responses)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_whole_pipeline_equals_the_written_objective(normalization: Normalization) -> None:
    batch = random_batch(4, 4, 11, non_finite_frac=0.1)
    numbers = batch_numbers(batch, normalization, False)
    loss = loss_and_gradients(batch, planned(batch, 25, 2, 0), numbers)[0]
    # Advantages and weights are float32 in a micro-batch: two roundings for each of the terms.
    size = sum(abs(a * w) * CAP * 2 for a, w in zip(*map(np.ravel, numbers), strict=True))
    bound = size * MAX_RESPONSE_TOKENS * 2.0**-22
    assert abs(float(loss) - literal_loss(batch, normalization)) < bound
    others = [literal_loss(batch, name) for name in NORMALIZATIONS if name != normalization]
    assert min(abs(float(loss) - other) for other in others) > 10 * bound


def test_mean_of_micro_batch_means_would_depend_on_the_cut() -> None:
    """The mistake the denominators guard against, shown to be visible to the test above."""
    batch = random_batch(4, 4, 11)
    numbers = batch_numbers(batch, "global_tokens", False)

    def wrong(budget: int) -> float:
        results = []
        for members in planned(batch, budget, 1, 0):
            local = np.zeros(batch.shape)
            tokens = sum(batch.summaries[g].num_tokens[i] for g, i in members)
            for member in members:
                local[member] = 1 / tokens
            results.append(float(loss_and_gradients(batch, [members], (numbers[0], local))[0]))
        return fmean(results)

    assert abs(wrong(25) - wrong(1000)) > 1e-3
