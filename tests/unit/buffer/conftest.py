"""A running buffer process for the tests that speak to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.buffer_process import BufferProcess, make_run


@pytest.fixture
def buffer(tmp_path: Path) -> Iterator[BufferProcess]:
    process = BufferProcess(make_run(tmp_path))
    process.start()
    yield process
    process.kill()
