"""The learner's only rank, for tests that run a real model; or none, for those that play ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def _without_other_learners() -> Iterator[None]:
    """Parallel groups are global to a process; those of another folder's tests come back."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    import torch.distributed as dist

    from dapo_hpc.learner.parallel import Layout, connect, disconnect

    was_connected = dist.is_initialized()
    disconnect()
    yield
    disconnect()
    if was_connected:
        connect(Layout(), 0, None)


@pytest.fixture(scope="module")
def here() -> Iterator[object]:
    with _without_other_learners():
        from dapo_hpc.learner.parallel import Layout, connect

        yield connect(Layout(), 0, None)


@pytest.fixture
def alone() -> Iterator[None]:
    with _without_other_learners():
        yield
