"""The buffer process: `python -m dapo_hpc.cli role buffer --run RUN_DIR`."""

from __future__ import annotations

import signal
import sys
from types import FrameType

from dapo_hpc.config import RunConfig
from dapo_hpc.run_dir import RunDir


def main(run: RunDir, config: RunConfig) -> int:
    """Serve until told to stop, or until the run is complete. Returns the exit code."""
    signal.signal(signal.SIGTERM, _stop_before_serving)
    from dapo_hpc.buffer.server import serve

    serve(run, config)
    return 0


def _stop_before_serving(_: int, __: FrameType | None) -> None:
    """Nothing was promised to anybody yet."""
    sys.exit(0)
