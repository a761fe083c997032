"""Vocabulary parallelism: which columns of the logits a rank holds, and how ranks exchange."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class VocabShard:
    """This rank's columns: `rank * num_columns` on, the same number on every rank."""

    start: int
    """First column, counted in the whole vocabulary."""
    num_columns: int
    """V_local."""
    num_valid: int
    """Columns that are real tokens; those after them are padding and take no part."""
    group: dist.ProcessGroup | None
    """The vocab-parallel ranks; None as well for a group of one."""

    @classmethod
    def of(
        cls,
        caller: str,
        num_columns: int,
        valid_vocab: int | None,
        group: dist.ProcessGroup | None,
    ) -> VocabShard:
        """Raises ValueError unless the real vocabulary fits into the shards of all ranks."""
        size, rank = (1, 0) if group is None else (group.size(), group.rank())
        valid = size * num_columns if valid_vocab is None else valid_vocab
        if not 1 <= valid <= size * num_columns:
            raise ValueError(
                f"{caller}: valid_vocab is {valid}, expected 1 to {size * num_columns} "
                f"({size} ranks of {num_columns} columns)."
            )
        start = rank * num_columns
        return cls(
            start=start,
            num_columns=num_columns,
            num_valid=min(max(valid - start, 0), num_columns),
            group=group if size > 1 else None,
        )

    @property
    def num_ranks(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    def gather(self, statistics: Tensor) -> tuple[Tensor, dist.Work | None]:
        """[S, C, 4] of this rank -> [R * S, C, 4] of all, once the work (None: now) is waited for.

        The only collective that log-probs need.
        """
        if self.group is None or statistics.numel() == 0:
            return statistics, None
        shape = (self.num_ranks * statistics.shape[0], *statistics.shape[1:])
        everyone = statistics.new_empty(shape)
        work = dist.all_gather_into_tensor(
            everyone, statistics.contiguous(), group=self.group, async_op=True
        )
        return everyone, work
