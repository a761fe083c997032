"""Imports go one way, and nothing of ours takes the name of a published package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FORBIDDEN = {
    # (package that imports, what it must not import): why
    ("dapo_kernels", "dapo_hpc"): "the kernels are of use without the rest",
    ("dapo_hpc.records", "dapo_hpc"): "records are the ground everything stands on",
    ("dapo_hpc.config", "dapo_hpc"): "the config is read before anything else is there",
    ("dapo_hpc.buffer", "dapo_hpc.learner"): "the buffer starts without torch",
    ("dapo_hpc.buffer", "dapo_hpc.rollout"): "the buffer starts without torch",
    ("dapo_hpc.prompts", "dapo_hpc.buffer"): "prompts come first in the flow",
    ("dapo_hpc.reward", "dapo_hpc.buffer"): "a scorer knows a text and an answer",
    ("dapo_hpc.learner", "dapo_hpc.rollout"): "learner and actor are different processes",
    ("dapo_hpc.rollout", "dapo_hpc.learner"): "learner and actor are different processes",
    ("dapo_hpc.observe", "dapo_hpc.buffer"): "status reads files, not services",
    ("dapo_hpc.observe", "dapo_hpc.learner"): "status reads files, not services",
}
ONLY_CLI_IMPORTS = ("dapo_hpc.roles", "dapo_hpc.launch")
NOT_HEAVY = ("torch", "vllm", "megatron", "transformers", "triton")
LIGHT = ("dapo_hpc.records", "dapo_hpc.config", "dapo_hpc.run_dir", "dapo_hpc.observe")
LIGHT += ("dapo_hpc.plan", "dapo_hpc.buffer", "dapo_hpc.launch", "dapo_hpc.cli")
LIGHT += ("dapo_hpc.prompts.order",)


def sources() -> dict[str, Path]:
    """Module name to file, for everything we ship."""
    files = [*(ROOT / "dapo_hpc").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    names = {}
    for file in files:
        base = ROOT / "kernels" if "kernels" in file.relative_to(ROOT).parts[:1] else ROOT
        parts = file.relative_to(base).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = file
    return names


def imports_of(text: str) -> set[str]:
    """Every module a source imports, also inside functions; TYPE_CHECKING blocks left out."""
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(text)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        nodes += ast.iter_child_nodes(node)
    return found


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def violations(modules: dict[str, set[str]]) -> list[str]:
    """`modules`: name -> what it imports."""
    found = []
    for module, imported in modules.items():
        for (package, target), why in FORBIDDEN.items():
            wrong = [n for n in imported if is_in(n, target) and not is_in(n, package)]
            if is_in(module, package) and wrong:
                found.append(f"{module} imports {wrong[0]}: {why}")
        for package in ONLY_CLI_IMPORTS:
            if module == "dapo_hpc.commands" or is_in(module, package):
                continue
            found += [f"{module} imports {n}" for n in imported if is_in(n, package)]
    return found


def test_imports_go_one_way() -> None:
    modules = {name: imports_of(file.read_text()) for name, file in sources().items()}
    assert len(modules) > 20
    assert violations(modules) == []


def test_the_rule_finds_a_wrong_import() -> None:
    text = "def f():\n    from dapo_hpc.roles import actor\n"
    assert violations({"dapo_hpc.buffer.core": imports_of(text)})
    assert violations({"dapo_kernels.loss": {"dapo_hpc.config"}})
    assert not violations({"dapo_hpc.commands": imports_of(text)})


def test_light_modules_do_not_import_heavy_libraries() -> None:
    found = [
        f"{name} imports {imported}"
        for name, file in sources().items()
        if any(is_in(name, light) for light in LIGHT)
        for imported in imports_of(file.read_text())
        if any(is_in(imported, heavy) for heavy in NOT_HEAVY)
    ]
    assert found == []


def test_nothing_of_ours_is_importable_as_kernels() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "kernels").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "code", ["from transformers import Qwen2ForCausalLM", "import vllm; vllm.LLM"]
)
def test_libraries_import_from_the_repository_root(code: str) -> None:
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
