"""The order in which prompts are dispatched: any position of it can be computed at any time."""

from __future__ import annotations

import functools

import numpy as np


class PromptOrder:
    """Position n of an endless order over the rows of the prompt file, one shuffle for each pass.

    The permutation of a pass sorts raw 64-bit draws of PCG64, a stream that numpy guarantees to
    stay the same, so that a run resumed years later continues the order it began.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        if num_rows < 1:
            raise ValueError(
                "the prompt file has 0 rows; a run needs at least one prompt. Check prompts.train "
                "and prompts.max_tokens."
            )
        self.num_rows = num_rows
        self._seed = seed

    def at(self, position: int) -> tuple[int, int]:
        """(pass, row) of a position, both counted from 0."""
        pass_index, place = divmod(position, self.num_rows)
        return pass_index, int(_permutation(self.num_rows, self._seed, pass_index)[place])


@functools.lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, pass_index: int) -> np.ndarray:
    """[num_rows] int64, every row once."""
    source = np.random.PCG64(np.random.SeedSequence([seed, pass_index]))
    return np.argsort(source.random_raw(num_rows), kind="stable")
