"""The buffer process: `python -m dapo_hpc.cli role buffer --run RUN_DIR`."""

from __future__ import annotations

import sys

from dapo_hpc.config import RunConfig
from dapo_hpc.roles import startup
from dapo_hpc.run_dir import RunDir


def main(
    run: RunDir, config: RunConfig, ports: range | None = None, interface: str | None = None
) -> int:
    """Serve until told to stop, or until the run is complete. Returns the exit code."""
    # Nothing was promised to anybody yet.
    startup.call_when_asked(lambda: sys.exit(0))
    from dapo_hpc.buffer.server import serve

    serve(run, config, ports=ports, interface=interface)
    return 0
