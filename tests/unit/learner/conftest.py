"""One learner process for all tests of this folder: Megatron's groups are global to a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def here() -> Iterator[object]:
    """The learner's only rank, connected."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    from dapo_hpc.learner.parallel import Layout, connect, disconnect

    yield connect(Layout(), 0, None)
    disconnect()
