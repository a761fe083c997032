"""What a team is to do; travels to its processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .shapes import Architecture, Load

Kind = Literal["ours", "padded", "by length", "matmul"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One way to do the step."""

    name: str
    kind: Kind
    architecture: Architecture
    load: Load
    model: Path
    """Hugging Face directory with the weights that everybody starts from."""
    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    """Of the matrix products."""
    threads: int = 1
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    is_plainly_bfloat16: bool = False
    """Of a plain step: parameters, gradients and moments too, instead of autocast from float32."""

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data
