"""Which of the three ways this process tests: torch on a CPU, Triton's interpreter, or a GPU."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

gpu_only = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
not_interpreted = pytest.mark.skipif(
    IS_INTERPRETED, reason="too large for Triton's interpreter; runs on torch and on a GPU"
)
torch_alone = pytest.mark.skipif(
    IS_INTERPRETED, reason="no Triton kernel has a part in it; runs without the interpreter"
)
cpu_checks_only = pytest.mark.skipif(
    DEVICE != "cpu", reason="on a GPU values are looked at in checked_values alone"
)


def tokens_here(num_tokens: int, *, interpreted: int = 8) -> int:
    """As many, or few for the interpreter, which takes milliseconds for each row."""
    return min(num_tokens, interpreted) if IS_INTERPRETED else num_tokens
