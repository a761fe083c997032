"""Which of several processes of one role this is."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rank:
    """A process among those of its role."""

    rank: int
    """0 to world - 1."""
    world: int
    local: int | None = None
    """Its number on its node, which is the number of its GPU; None: `rank`, on one node."""

    @classmethod
    def of_step(cls) -> Rank:
        """As Slurm numbers the tasks of a step. Raises ValueError outside a step."""
        try:
            return cls(
                rank=int(os.environ["SLURM_PROCID"]),
                world=int(os.environ["SLURM_NTASKS"]),
                local=int(os.environ["SLURM_LOCALID"]),
            )
        except KeyError as missing:
            raise ValueError(
                f"--from-slurm: {missing.args[0]} is not set, so this is no task of a Slurm step. "
                "Start it with srun, or give --rank and --world."
            ) from None
