"""The vocab-parallel world, started once."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of four gloo processes computed over 2 and over 4 vocabulary shards."""
    from vocab_parallel_world import results_by_rank

    return results_by_rank(tmp_path_factory.mktemp("vocab-parallel"))
