"""What roles do before their work."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from dapo_hpc.roles import startup


def test_quick_start_collects_nothing_inside_and_again_afterwards() -> None:
    frozen = gc.get_freeze_count()
    with startup.quick_start():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen
    gc.unfreeze()


def test_quick_start_collects_again_after_an_error() -> None:
    with pytest.raises(ImportError), startup.quick_start():
        raise ImportError("a broken module")
    assert gc.isenabled()
    gc.unfreeze()


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
    code = (
        "import sys\n"
        "from dapo_hpc.roles import startup\n"
        "with startup.without('torch'):\n"
        "    from transformers import AutoTokenizer\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
