"""What the kernel benchmarks share.

    inputs --provider--> results --truth--> error      on a small shape, before anything is timed
    inputs --provider--> clock --> times / ceilings --> rows --> report, targets

A *task* is one thing to compute at one shape; a *provider* is one way to compute it, ours or a
peer's. All providers of a task run in one process on the same inputs, in turns.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The kernels of this tree, installed or not: a GPU machine may have torch and nothing else.
if str(ROOT / "kernels") not in sys.path:
    sys.path.insert(0, str(ROOT / "kernels"))
