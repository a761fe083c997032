"""Plans place every response once; packing loses and invents nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_batches import Batch, random_batch

from dapo_hpc.learner.packing import (
    MicroBatch,
    StepPlan,
    pack,
    plan_step,
    token_weights,
    trained_tokens,
    unpack,
)
from dapo_hpc.records import PolicyVersion, VersionSpan

batch_shapes = st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(0, 10**6))


def make_plan(batch: Batch, **changes: int) -> StepPlan:
    options = {
        "mini_batches": 2,
        "micro_batch_tokens": 30,
        "data_parallel": 2,
        "seed": 0,
        **changes,
    }
    return plan_step(batch.summaries, **options)


@given(
    shape=batch_shapes,
    mini_batches=st.integers(1, 4),
    budget=st.integers(1, 60),
    data_parallel=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_every_response_is_placed_once(
    shape: tuple[int, int, int], mini_batches: int, budget: int, data_parallel: int, seed: int
) -> None:
    batch = random_batch(*shape)
    plan = plan_step(
        batch.summaries,
        mini_batches=mini_batches,
        micro_batch_tokens=budget,
        data_parallel=data_parallel,
        seed=seed,
    )
    num_groups, group_size = batch.shape
    placed: Counter[tuple[int, int]] = Counter()
    for mini in plan.mini_batches:
        members = [member for rank in mini.ranks for micro in rank for member in micro]
        assert {position for position, _ in members} == set(mini.groups)
        placed.update(members)
        assert len(mini.ranks) == data_parallel
        assert len({len(rank) for rank in mini.ranks}) == 1
        for rank in mini.ranks:
            for micro in rank:
                tokens = [sequence_tokens(batch, member) for member in micro]
                assert len(micro) <= 1 or sum(tokens) <= budget
    assert placed == Counter((g, i) for g in range(num_groups) for i in range(group_size))
    sizes = [len(mini.groups) for mini in plan.mini_batches]
    assert len(sizes) == min(mini_batches, num_groups)
    assert max(sizes) - min(sizes) <= 1
    assert sorted(g for mini in plan.mini_batches for g in mini.groups) == list(range(num_groups))


def sequence_tokens(batch: Batch, member: tuple[int, int]) -> int:
    summary = batch.summaries[member[0]]
    return summary.num_prompt_tokens + summary.num_tokens[member[1]]


@given(shape=batch_shapes, data_parallel=st.integers(2, 4))
def test_ranks_differ_by_at_most_one_sequence(
    shape: tuple[int, int, int], data_parallel: int
) -> None:
    """Longest first to the least loaded: no rank is ahead by more than its last sequence."""
    batch = random_batch(*shape)
    plan = make_plan(batch, mini_batches=1, data_parallel=data_parallel)
    loads = [
        [sequence_tokens(batch, member) for micro in rank for member in micro]
        for rank in plan.mini_batches[0].ranks
    ]
    for load in loads:
        if load:
            assert sum(load) - min(load) <= min(map(sum, loads))


def test_neighbours_in_length_share_a_micro_batch() -> None:
    batch = random_batch(20, 4, 5)
    plan = make_plan(batch, mini_batches=1, data_parallel=1)
    micro_batches = plan.mini_batches[0].ranks[0]
    lengths = [sequence_tokens(batch, member) for micro in micro_batches for member in micro]
    assert lengths == sorted(lengths, reverse=True)
    # A sequence opens a micro-batch only if it would not have fitted the one before.
    for before, after in pairwise(micro_batches):
        tokens = sum(sequence_tokens(batch, member) for member in before)
        assert tokens + sequence_tokens(batch, after[0]) > 30


def test_plan_depends_on_the_seed_and_on_nothing_else() -> None:
    batch = random_batch(8, 2, 1)
    assert make_plan(batch, seed=3) == make_plan(batch, seed=3)
    shuffles = {tuple(m.groups for m in make_plan(batch, seed=s).mini_batches) for s in range(20)}
    assert len(shuffles) > 15


def test_positions_name_the_groups_a_rank_reads() -> None:
    batch = random_batch(9, 2, 1)
    plan = make_plan(batch, data_parallel=3)
    for rank in range(3):
        needed = {g for mini in plan.mini_batches for micro in mini.ranks[rank] for g, _ in micro}
        assert plan.positions(rank) == sorted(needed)


@pytest.mark.parametrize(
    "change", [{"mini_batches": 0}, {"micro_batch_tokens": 0}, {"data_parallel": 0}]
)
def test_plan_refuses_what_is_not_positive(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} = 0"):
        make_plan(random_batch(2, 2, 0), **change)


def test_plan_refuses_an_empty_batch() -> None:
    with pytest.raises(ValueError, match="0 groups"):
        plan_step([], mini_batches=1, micro_batch_tokens=1, data_parallel=1, seed=0)


def pack_all(batch: Batch, multiple: int, seed: int, weights: np.ndarray) -> list[MicroBatch]:
    advantages = np.random.default_rng(seed).normal(size=batch.shape)
    plan = make_plan(batch, seed=seed)
    return [
        pack(micro, batch.groups, advantages=advantages, weights=weights, multiple=multiple)
        for mini in plan.mini_batches
        for rank in mini.ranks
        for micro in rank
    ]


@settings(max_examples=50)
@given(shape=batch_shapes, multiple=st.integers(1, 8), seed=st.integers(0, 1000))
def test_unpack_returns_what_was_packed(
    shape: tuple[int, int, int], multiple: int, seed: int
) -> None:
    batch = random_batch(*shape, non_finite_frac=0.1)
    generator = np.random.default_rng(seed)
    weights = generator.uniform(0.1, 1, batch.shape) * (generator.random(batch.shape) > 0.2)
    seen = set()
    for micro in pack_all(batch, multiple, seed, weights):
        assert not micro.advantages[~micro.loss_mask].any()
        columns = (micro.targets, micro.rollout_logprobs, micro.loss_mask, micro.token_weights)
        unpacked = zip(*(unpack(column, micro) for column in columns), strict=True)
        for member, (tokens, logprobs, mask, weight) in zip(micro.members, unpacked, strict=True):
            response = batch.groups[member[0]].responses[member[1]]
            finite = np.isfinite(response.rollout_logprobs)
            assert tokens.tolist() == response.token_ids.tolist()
            assert mask.tolist() == (finite & (weights[member] > 0)).tolist()
            np.testing.assert_array_equal(logprobs[finite], response.rollout_logprobs[finite])
            assert torch.isfinite(logprobs).all()
            assert set(weight[mask].tolist()) <= {float(np.float32(weights[member]))}
            assert not weight[~mask].any()
            seen.add(member)
    assert len(seen) == batch.shape[0] * batch.shape[1]


@settings(max_examples=50)
@given(shape=batch_shapes, multiple=st.integers(1, 8), seed=st.integers(0, 1000))
def test_layout_of_a_row(shape: tuple[int, int, int], multiple: int, seed: int) -> None:
    batch = random_batch(*shape)
    for micro in pack_all(batch, multiple, seed, np.ones(batch.shape)):
        bounds = micro.cu_seqlens.tolist()
        num_tokens = len(micro.token_ids)
        assert num_tokens % multiple == 0
        assert (bounds[0], bounds[-1]) == (0, num_tokens)
        assert len(bounds) - 1 == len(micro.members) + bool(micro.num_padding_tokens)
        assert micro.max_sequence_tokens == max(b - a for a, b in pairwise(bounds))
        assert micro.num_padding_tokens < multiple or not micro.members
        for a, b in pairwise(bounds):
            assert micro.positions[a:b].tolist() == list(range(b - a))
        for member, a, b in zip(micro.members, bounds, bounds[1:], strict=False):
            group = batch.groups[member[0]]
            response = group.responses[member[1]]
            whole = [*group.prompt.token_ids.tolist(), *response.token_ids.tolist()]
            assert micro.token_ids[a:b].tolist() == whole
            assert micro.targets[a:b].tolist() == [*whole[1:], 0]
            trained = [False] * (len(whole) - 1 - len(response.token_ids))
            expected = [*trained, *[True] * len(response.token_ids), False]
            assert micro.loss_mask[a:b].tolist() == expected
        end = num_tokens - micro.num_padding_tokens
        for column in (micro.token_ids, micro.loss_mask, micro.token_weights, micro.advantages):
            assert not column[end:].any()
            if column is not micro.token_ids:
                assert not column[~micro.loss_mask].any()


def test_types_are_those_the_model_takes() -> None:
    batch = random_batch(2, 2, 0)
    micro = pack(
        [(0, 0), (1, 1)], batch.groups, advantages=np.ones((2, 2)), weights=np.ones((2, 2))
    )
    int64, float32 = torch.int64, torch.float32
    assert (micro.token_ids.dtype, micro.positions.dtype, micro.targets.dtype) == (int64,) * 3
    assert (micro.cu_seqlens.dtype, micro.loss_mask.dtype) == (torch.int32, torch.bool)
    columns = (micro.advantages, micro.token_weights, micro.rollout_logprobs)
    assert {column.dtype for column in columns} == {float32}
    moved = micro.to("meta")
    assert moved.token_ids.device.type == moved.loss_mask.device.type == "meta"
    assert moved.members == micro.members


def test_each_predicted_token_knows_the_step_of_the_weights_that_sampled_it() -> None:
    batch = random_batch(1, 2, 0)
    old, new = PolicyVersion(step=4, lineage=1), PolicyVersion(step=5, lineage=2)
    first = batch.groups[0].responses[0]
    tokens = np.arange(5, dtype=np.int32)
    mixed = replace(
        first,
        token_ids=tokens,
        rollout_logprobs=np.zeros(5, np.float32),
        spans=(VersionSpan(start=0, version=old), VersionSpan(start=2, version=new)),
    )
    groups = {0: replace(batch.groups[0], responses=(mixed,))}
    micro = pack([(0, 0)], groups, advantages=np.ones((1, 1)), weights=np.ones((1, 1)))
    (answer,) = unpack(micro.sampling_steps, micro)
    assert answer.tolist() == [4, 4, 5, 5, 5]
    num_prompt = len(groups[0].prompt.token_ids)
    assert micro.sampling_steps.tolist() == [-1] * (num_prompt - 1) + [4, 4, 5, 5, 5] + [-1]


@pytest.mark.parametrize("multiple", [1, 4])
def test_empty_micro_batch_is_padding(multiple: int) -> None:
    micro = pack([], {}, advantages=np.zeros((0, 0)), weights=np.zeros((0, 0)), multiple=multiple)
    assert micro.token_ids.tolist() == [0] * multiple
    assert micro.cu_seqlens.tolist() == [0, multiple]
    assert micro.num_padding_tokens == multiple
    assert not micro.loss_mask.any()
    assert unpack(micro.targets, micro) == []


@settings(max_examples=50)
@given(shape=batch_shapes, seed=st.integers(0, 1000))
def test_packed_weights_sum_to_the_denominator(shape: tuple[int, int, int], seed: int) -> None:
    """Over all ranks and micro-batches of a mini-batch, dropped and filtered tokens left out."""
    batch = random_batch(*shape, non_finite_frac=0.2)
    dropped = np.array(
        [
            [np.count_nonzero(~np.isfinite(r.rollout_logprobs)) for r in group.responses]
            for group in batch.groups.values()
        ]
    )
    counts = trained_tokens(batch.summaries, overlong_filtering=True, dropped=dropped)
    for mini in make_plan(batch, seed=seed).mini_batches:
        rows = list(mini.groups)
        weights = np.zeros(batch.shape)
        weights[rows] = token_weights(counts[rows], "global_tokens", max_response_tokens=9)
        packed = [
            pack(micro, batch.groups, advantages=weights, weights=weights)
            for rank in mini.ranks
            for micro in rank
        ]
        assert sum(int(micro.loss_mask.sum()) for micro in packed) == counts[rows].sum()
        total = sum(float(micro.token_weights.double().sum()) for micro in packed)
        expected = 1.0 if counts[rows].any() else 0.0
        # Each weight is rounded to float32 once: 2^-24 of itself.
        assert total == pytest.approx(expected, rel=2.0**-23)
