"""For tests that form parallel groups of their own, which a process has once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def alone() -> Iterator[None]:
    """No parallel groups in this process; those of other tests' learner come back afterwards."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    import torch.distributed as dist

    from dapo_hpc.learner.parallel import Layout, connect, disconnect

    was_connected = dist.is_initialized()
    disconnect()
    yield
    disconnect()
    if was_connected:
        connect(Layout(), 0, None)
