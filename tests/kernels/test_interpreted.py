"""The Triton kernels on a machine without GPU: these tests once more, under Triton's interpreter.

In a process of its own, because Triton looks at TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_backends import DEVICE, IS_INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
MULTIPROC = ROOT / "tests" / "multiproc"
NOT_THERE = ("test_interpreted.py", "test_compiled.py", "test_gpu.py", "test_main_grad.py")
"""This file, and what has nothing to interpret."""


@pytest.mark.slow
@pytest.mark.skipif(IS_INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the compiled kernels have been tested")
@pytest.mark.parametrize("where", ["kernels", pytest.param("multiproc", marks=pytest.mark.full)])
def test_kernels_under_the_interpreter(where: str) -> None:
    files = {
        "kernels": [
            path for path in Path(__file__).parent.glob("test_*.py") if path.name not in NOT_THERE
        ],
        "multiproc": list(MULTIPROC.glob("test_vocab_parallel_*.py")),
    }[where]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not full", *map(str, sorted(files))],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(result.stdout[-4000:])
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
