"""Rows on context-parallel ranks: every token once, even work, and attention as on one rank."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dapo_hpc.learner import attention
from dapo_hpc.learner.attention import (
    PackedAttention,
    PackedSequences,
    RotaryTable,
    describe,
    describe_share,
)
from dapo_hpc.learner.context import Share, chunks, shares

CPU = torch.device("cpu")
HEADS, GROUPS, SIZE = 4, 2, 8
ROWS = st.lists(st.integers(1, 40), min_size=0, max_size=9)


@given(ROWS, st.integers(1, 4), st.sampled_from([1, 2, 4]))
def test_every_token_lies_on_one_rank_and_comes_back(
    lengths: list[int], ranks: int, multiple: int
) -> None:
    total = sum(lengths)
    every = shares(np.array(lengths, np.int64), ranks, multiple)
    held = np.concatenate([share.places for share in every])
    assert sorted(held.tolist()) == list(range(total))
    assert len({share.size for share in every}) == 1
    longest = max(len(share.places) for share in every)
    assert longest <= every[0].size < max(longest, 1) + multiple
    assert every[0].size % multiple == 0
    row = np.arange(1, total + 1)
    parts = [torch.from_numpy(share.take(row)) for share in every]
    assert all(
        int((part == 0).sum()) == share.size - len(share.places)
        for part, share in zip(parts, every, strict=True)
    )
    back = sum(share.put_back(part, total) for share, part in zip(every, parts, strict=True))
    assert torch.equal(torch.as_tensor(back), torch.from_numpy(row))


@given(ROWS.filter(bool), st.integers(1, 4))
def test_chunks_are_the_row_and_each_sees_its_sequence_up_to_its_end(
    lengths: list[int], ranks: int
) -> None:
    every = shares(np.array(lengths), ranks, 2)
    gathered = np.full(ranks * every[0].size, -1)
    for rank, share in enumerate(every):
        gathered[rank * share.size : rank * share.size + len(share.places)] = share.places
    starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    for rank, share in enumerate(every):
        end = 0
        for chunk in chunks(np.array(lengths), every, rank):
            assert chunk.start == end < chunk.end
            end = chunk.end
            if chunk.start >= len(share.places):  # filler sees itself
                assert (gathered[chunk.keys] == -1).all()
                continue
            last = share.places[chunk.end - 1]
            assert gathered[chunk.keys].tolist() == list(range(starts[last], last + 1))
        assert end == share.size


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_have_as_much_to_do(ranks: int) -> None:
    """Pairs of query and key; one chunk a rank would give the last one far more than the first."""
    lengths = np.array([4096, 1000, 20000])
    every = shares(lengths, ranks)
    work = [
        sum((c.end - c.start) * len(c.keys) for c in chunks(lengths, every, rank))
        for rank in range(ranks)
    ]
    assert max(work) < 1.001 * min(work)


# ------------------------------------------------------------------ attention


class Ranks:
    """All ranks in one process: what each gathers, the others have left here before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int = 1) -> None:
        self.parts: list[Tensor] = []
        self._step = step
        monkeypatch.setattr(attention, "gather_from_sequence_parallel_region", self.gather)

    def gather(self, part: Tensor, group: None) -> Tensor:
        assert group is None
        assert any(torch.equal(part, each) for each in self.parts)
        return torch.cat(self.parts[:: self._step])


def inputs(total: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(total, n, SIZE, generator=generator, requires_grad=True)
        for n in (HEADS, GROUPS, GROUPS)
    ]


def with_angles(sequences: PackedSequences) -> PackedSequences:
    frequencies = 1.0 / 100.0 ** (torch.arange(0, SIZE, 2) / SIZE)
    return sequences.with_angles(RotaryTable(frequencies, 1.0, CPU))


def over_ranks(qkv: list[Tensor], lengths: list[int], every: list[Share], world: Ranks) -> Tensor:
    """[T, h * d]: the parts of all ranks put back together."""
    packed = [
        with_angles(describe_share(np.array(lengths), every, rank, None, CPU))
        for rank in range(len(every))
    ]
    mine = [[part(x, share) for x in qkv] for share in every]
    world.parts = [
        torch.cat([attention.rotated(q, k, row)[1], v], dim=1)
        for (q, k, v), row in zip(mine, packed, strict=True)
    ]
    whole = torch.zeros(sum(lengths), HEADS * SIZE)
    for (q, k, v), row, share in zip(mine, packed, every, strict=True):
        output = PackedAttention()(q, k, v, packed_seq_params=row)
        assert len(output) == share.size
        whole = whole.index_copy(0, torch.from_numpy(share.places), output[: len(share.places)])
    return whole


def part(x: Tensor, share: Share) -> Tensor:
    filler = x.new_ones(share.size - len(share.places), *x.shape[1:])
    return torch.cat([x[torch.from_numpy(share.places)], filler])


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("lengths", [[24], [1], [5, 1, 30, 2, 3]], ids=str)
def test_attention_over_ranks_is_attention_on_one(
    lengths: list[int], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = inputs(sum(lengths))
    expected = PackedAttention()(
        *qkv, packed_seq_params=with_angles(describe(np.array(lengths), CPU))
    )
    every = shares(np.array(lengths), ranks, 2)
    found = over_ranks(qkv, lengths, every, Ranks(monkeypatch))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for ours, truth in zip(
        torch.autograd.grad(found, qkv, upstream),
        torch.autograd.grad(expected, qkv, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-4)


def test_parts_in_the_wrong_order_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    lengths = [5, 1, 30, 2, 3]
    qkv = inputs(sum(lengths))
    expected = PackedAttention()(
        *qkv, packed_seq_params=with_angles(describe(np.array(lengths), CPU))
    )
    world = Ranks(monkeypatch, step=-1)
    found = over_ranks(qkv, lengths, shares(np.array(lengths), 2, 2), world)
    assert (found - expected).abs().max() > 0.1
