"""Runs of packed sequences: every sequence once, little padding, exact attention."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
from hypothesis import given
from hypothesis import strategies as st

from dapo_hpc.learner.attention import (
    MAX_PADDED_SHARE,
    MIN_RUN_TOKENS,
    PackedAttention,
    RotaryTable,
    describe,
    run_bounds,
)

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60))
def test_runs_cover_every_sequence_once_with_little_padding(lengths: list[int]) -> None:
    bounds = run_bounds(np.array(lengths))
    assert [i for first, last in bounds for i in range(first, last)] == list(range(len(lengths)))
    for first, last in bounds:
        inside = lengths[first:last]
        padded = max(inside) * len(inside)
        assert padded <= max(MAX_PADDED_SHARE * sum(inside), MIN_RUN_TOKENS) or len(inside) == 1


@pytest.mark.parametrize(
    "lengths",
    [
        [5],  # one sequence: no padding
        [4, 4, 4],  # equal lengths: a view
        [9, 1, 6],  # padded
        [2000, 3, 2, 1],  # two runs
    ],
)
def test_attention_equals_a_dense_mask(lengths: list[int]) -> None:
    total, heads, groups, size = sum(lengths), 4, 2, 8
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(total, n, size, generator=generator, requires_grad=True)
        for n in (heads, groups, groups)
    )
    frequencies = 1.0 / 100.0 ** (torch.arange(0, size, 2) / size)
    packed = describe(np.array(lengths), CPU).with_angles(RotaryTable(frequencies, 1.0, CPU))
    attention = PackedAttention()
    found = attention(query, key, value, packed_seq_params=packed)
    expected = dense(query, key, value, lengths, frequencies)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    upstream = torch.randn(found.shape, generator=generator)
    for ours, truth in zip(
        torch.autograd.grad(found, (query, key, value), upstream),
        torch.autograd.grad(expected, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-4)


def dense(query, key, value, lengths, frequencies):  # type: ignore[no-untyped-def]
    """softmax(q k^T / sqrt(d) + mask) v with complex rotations and a block-diagonal mask."""
    positions = torch.cat([torch.arange(n) for n in lengths])
    turn = torch.polar(torch.ones(1), positions[:, None] * frequencies)[:, None]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    repeats = query.shape[1] // key.shape[1]
    q, k = rotate(query), rotate(key).repeat_interleave(repeats, 1)
    v = value.repeat_interleave(repeats, 1)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (owner[:, None] == owner[None]).tril()
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).reshape(len(owner), -1)
