"""One learner for the tests of a file: Megatron's groups are global to a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def here() -> Iterator[object]:
    """The learner's only rank, connected."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    from dapo_hpc.learner.parallel import Layout, connect, disconnect

    yield connect(Layout(), 0, None)
    disconnect()
