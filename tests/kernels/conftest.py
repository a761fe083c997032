"""Where the kernels run: compiled on a GPU, else on the CPU (torch, or Triton's interpreter)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_backends import DEVICE

from dapo_kernels.backend import operations


@pytest.fixture(scope="session")
def device() -> str:
    """The same tests everywhere."""
    return DEVICE


@pytest.fixture
def ops(device: str) -> Any:
    """The module whose row operations run here; negative controls put wrong ones into it."""
    return operations(torch.empty(0, device=device))
