"""`dapo check --build`: the ranks as Megatron builds them, beside the plan."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from dapo_hpc import cli
from dapo_hpc.learner import build_check
from dapo_hpc.plan.parameters import rank_parameters

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SMALL = CONFIGS / "qwen2.5_7b_dapo.toml"
pytestmark = pytest.mark.usefixtures("alone")


def build(capsys: pytest.CaptureFixture[str], path: Path, *overrides: str) -> tuple[int, Any, str]:
    """Exit code, JSON and what is refused."""
    words = [word for override in overrides for word in ("--set", override)]
    code = cli.main(["check", str(path), "--build", "--json", *words])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


@pytest.mark.parametrize(
    ("name", "ranks", "parameters"),
    [
        ("qwen2.5_7b_dapo", 4, "1,904,057,344"),
        pytest.param("qwen2.5_32b_dapo", 16, "2,048,033,792", marks=pytest.mark.slow),
    ],
)
def test_shipped_configs_are_built_as_planned(
    name: str, ranks: int, parameters: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found, err = build(capsys, CONFIGS / f"{name}.toml")
    assert (code, err) == (0, "")
    assert f"built without memory: {ranks} ranks of at most {parameters} " in found["notes"][-1]


def test_another_number_than_the_plan_s_is_noticed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*of: Any) -> Any:
        right = rank_parameters(*of)
        return replace(right, held=right.held - 1)

    monkeypatch.setattr(build_check, "rank_parameters", wrong)
    with pytest.raises(AssertionError, match="disagree about stage 0: 1904057343 and 1904057344"):
        build(capsys, SMALL)


def test_what_transformers_refuses_is_a_problem(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The plan reads sizes alone."""
    source = CONFIGS / "models" / "Qwen2.5-7B" / "config.json"
    table = {**json.loads(source.read_text()), "rms_norm_eps": "small"}
    (tmp_path / "config.json").write_text(json.dumps(table))
    model = f"model.path={tmp_path}"
    assert cli.main(["check", str(SMALL), "--set", model]) == 0
    capsys.readouterr()
    code, found, err = build(capsys, SMALL, model)
    assert code == 2
    assert "transformers refuses it" in err
    assert found["problems"]


def test_nothing_is_built_of_what_the_plan_refuses(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(build_check, "dry_run")
    code, _, err = build(capsys, SMALL, "learner.tensor_parallel=3")
    assert code == 2
    assert "does not divide" in err
    code, _, err = build(capsys, SMALL, f"model.path={tmp_path}/none")
    assert code == 2
    assert f"--build needs {tmp_path}/none/config.json" in err


def test_without_the_learner_s_libraries_there_is_a_sentence() -> None:
    code = f"""import sys
sys.modules["torch"] = None
from dapo_hpc import cli
sys.exit(cli.main(["check", {str(SMALL)!r}, "--build"]))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("dapo check --build needs what the learner needs, and torch is ")
