"""Context parallelism: one packed row on several ranks, which attend to each other's keys.

Each sequence is cut into two chunks for each rank. Rank r of R holds chunk r and chunk 2 R - 1 - r
of every sequence: an early one, which attends to little, and a late one, which attends to much, so
that all ranks have as much to do. Source: Llama 3, arXiv 2407.21783, section 3.3.2, as is the way
of attention: keys and values of all ranks are gathered, and each query looks at those before it.

    sequence   0 1 2 3 4 5 6 7     R = 2
    rank 0     0 1         6 7
    rank 1         2 3 4 5

Chunks differ in length by a token at most where 2 R does not divide the sequence. Rows of the ranks
are filled up at the end to one length.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a packed row that one rank holds."""

    places: np.ndarray
    """[n] int64: of its tokens in the whole row, in its own order."""
    size: int
    """T': tokens and filler, the same on every rank."""

    def take(self, values: np.ndarray) -> np.ndarray:
        """[T, ...] of the whole row -> [T', ...] of this rank; filler is 0."""
        taken = np.zeros((self.size, *values.shape[1:]), values.dtype)
        taken[: len(self.places)] = values[self.places]
        return taken

    def take_tensor(self, values: Tensor) -> Tensor:
        """The same, for a tensor on the host."""
        return torch.from_numpy(self.take(values.numpy()))

    def put_back(self, values: Tensor, total: int) -> Tensor:
        """[T'] of this rank -> [total] of the whole row, 0 where other ranks hold the tokens."""
        row = values.new_zeros(total)
        row[torch.from_numpy(self.places).to(values.device)] = values[: len(self.places)]
        return row


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive queries of this rank, and what the last of them attends to."""

    start: int
    """Of the queries in this rank's row."""
    end: int
    keys: np.ndarray
    """[k] int64: places in the gathered rows, [R * T'], from the sequence's start to the chunk's
    end. Query i of n attends to the first k - n + 1 + i of them."""


def shares(lengths: np.ndarray, ranks: int, multiple: int = 1) -> list[Share]:
    """Who holds what of a packed row.

    Args:
        lengths: [B] tokens of each sequence, in packed order.
        ranks: R.
        multiple: T' is one of it (sequence parallelism: the tensor-parallel size).
    """
    places = []
    for rank in range(ranks):
        runs = [np.arange(start, end) for _, start, end in _chunks(lengths, ranks, rank)]
        places.append(np.concatenate([np.empty(0, np.int64), *runs]))
    longest = max(1, *map(len, places))
    return [Share(mine, -(-longest // multiple) * multiple) for mine in places]


def chunks(lengths: np.ndarray, every: list[Share], rank: int) -> list[Chunk]:
    """The chunks of one rank in the order of its row, filler included.

    Args:
        lengths: [B] tokens of each sequence.
        every: `shares` of all ranks.
        rank: whose chunks.
    """
    gathered = np.empty(int(lengths.sum()), np.int64)
    for number, share in enumerate(every):
        gathered[share.places] = number * share.size + np.arange(len(share.places))
    found, done = [], 0
    for first, start, end in _chunks(lengths, len(every), rank):
        if start < end:
            found.append(Chunk(done, done + end - start, gathered[first:end]))
            done += end - start
    mine = every[rank]
    if done < mine.size:
        found.append(Chunk(done, mine.size, rank * mine.size + np.arange(done, mine.size)))
    return found


def _chunks(lengths: np.ndarray, ranks: int, rank: int) -> list[tuple[int, int, int]]:
    """(start of the sequence, start of the chunk, its end) in the whole row, two a sequence."""
    found = []
    for first, last in pairwise([0, *np.cumsum(lengths).tolist()]):
        for number in (rank, 2 * ranks - 1 - rank):
            bounds = [first + (last - first) * n // (2 * ranks) for n in (number, number + 1)]
            found.append((first, bounds[0], bounds[1]))
    return found
