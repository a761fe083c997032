"""What roles do before their work."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dapo_hpc.roles import startup

QUICK_START = """
import gc
from dapo_hpc.roles import startup

try:
    with startup.quick_start():
        assert not gc.isenabled()
        if {fails}:
            raise ImportError("a broken module")
except ImportError:
    assert {fails}
assert gc.isenabled()
assert gc.get_freeze_count() > 1000
"""


@pytest.mark.parametrize("fails", [False, True])
def test_quick_start_collects_nothing_inside_and_again_afterwards(fails: bool) -> None:
    run(QUICK_START.format(fails=fails))


def test_a_module_is_hidden_and_back_again() -> None:
    name = "wave"
    sys.modules.pop(name, None)
    with startup.without(name), pytest.raises(ImportError):
        __import__(name)
    assert __import__(name).__name__ == name


def test_an_imported_module_stays() -> None:
    with startup.without("json"):
        assert __import__("json").loads("1") == 1


def test_tokenizers_start_without_torch() -> None:
    run(
        "import sys\n"
        "from dapo_hpc.roles import startup\n"
        "with startup.without('torch'):\n"
        "    from transformers import AutoTokenizer\n"
        "assert 'torch' not in sys.modules\n"
    )


def run(code: str) -> None:
    """In a process of its own: what is frozen or hidden stays so."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LEAVES = """
import os, signal, threading, time
from dapo_hpc.roles import startup

startup.{function}()
held = threading.Event()
threading.Thread(target=held.wait, args=({held_s},)).start()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("function", "held_s"),
    [
        ("leave_at_once_when_asked", 3600),  # a thread that writes is not waited for
        ("leave_when_asked", 0.1),
    ],
)
def test_a_role_that_is_asked_to_stop_exits_0(function: str, held_s: float) -> None:
    run(LEAVES.format(function=function, held_s=held_s))
