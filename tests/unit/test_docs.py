"""Every command, link and file that the documents name is there."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from dapo_hpc.cli import parser
from dapo_hpc.config import known_keys
from dapo_hpc.config.loading import keys_of
from dapo_hpc.launch.site import Site

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FILE_KINDS = (".py", ".toml", ".md", ".sh", ".json", ".sbatch")
PLACEHOLDERS = ("configs/X.toml",)


def commands() -> Iterator[tuple[str, str]]:
    """(document, line) of every line of a shell block that is not a comment."""
    for document in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL):
            for line in block.splitlines():
                text = line.partition("#")[0].strip()
                if text:
                    yield document.name, text


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def problem(line: str) -> str | None:
    """Why a documented command cannot work; None when it can."""
    words = [word for word in shlex.split(line) if "=" not in word or word.startswith("-")]
    if words[0] == "make":
        missing = set(words[1:]) - targets()
        return f"no make target {sorted(missing)}" if missing else None
    if words[0].endswith("dapo"):
        try:
            parser().parse_args(shlex.split(line)[1:])
        except SystemExit:
            return "dapo does not take these words"
        return None
    if words[0] in ("sbatch", "cp"):
        files = [word for word in words[1:] if not word.startswith("-")]
        missing = [file for file in files[:1] if not (ROOT / file).exists()]
        return f"no file {missing[0]}" if missing else None
    if words[0] == "mkdir":
        return None
    if words[0] in ("python", ".venv/bin/python") and words[1] == "-m":
        return None if importlib.util.find_spec(words[2]) else f"no module {words[2]}"
    if words[0] in ("python", ".venv/bin/python"):
        return None if (ROOT / words[1]).exists() else f"no file {words[1]}"
    return f"this test does not know {words[0]!r}"


def test_there_are_commands_to_look_at() -> None:
    assert {document for document, _ in commands()} >= {"README.md"}


@pytest.mark.parametrize(("document", "line"), list(commands()))
def test_command_can_be_run(document: str, line: str) -> None:
    assert problem(line) is None, f"{document}: {line}: {problem(line)}"


WRONG = ["make nothing", "dapo trian x.toml", "python perf/none.py", "python -m dapo_kernels.none"]
WRONG += ["sbatch slurm/none.sbatch"]


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_is_noticed(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert problem(line) is not None
    capsys.readouterr()


def examples() -> Iterator[tuple[str, str]]:
    """(document, text) of every Python block."""
    for document in DOCUMENTS:
        for block in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL):
            yield document.name, block


@pytest.mark.parametrize(("document", "block"), list(examples()))
def test_example_runs(document: str, block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, document, "exec"), {})
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_in_backquotes_exist(document: Path) -> None:
    """`buffer/core.py` is looked for below the root and below dapo_hpc/."""
    named = {n for n in re.findall(r"`([\w./-]+)`", document.read_text()) if "/" in n}
    files = [n for n in named if n.endswith(FILE_KINDS) and not n.startswith(("runs/", "data/"))]
    files = [name for name in files if name not in PLACEHOLDERS]
    missing = [n for n in files if not ((ROOT / n).exists() or (ROOT / "dapo_hpc" / n).exists())]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_config_keys_in_backquotes_exist(document: Path) -> None:
    known = {*known_keys(), *keys_of(Site)}
    sections = {key.partition(".")[0] for key in known if "." in key}
    named = re.findall(r"`([a-z_]+\.[a-z_]+)`", document.read_text())
    keys = {key for key in named if key.partition(".")[0] in sections}
    assert {key for key in keys if key not in known and not key.endswith(".py")} == set()
