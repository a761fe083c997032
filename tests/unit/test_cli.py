"""The command line: instant, and nothing starts on a faulty config."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dapo_hpc import cli

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "vllm", "megatron", "transformers", "pyarrow", "matplotlib", "pandas")


def dapo(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "dapo_hpc.cli", *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def modules_after(code: str) -> set[str]:
    """Top-level modules a fresh interpreter holds after running the code."""
    report = "\nimport json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code + report], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_takes_less_than_half_a_second_and_hides_roles() -> None:
    times = []
    for _ in range(3):
        begin_s = time.perf_counter()
        done = dapo("--help")
        times.append(time.perf_counter() - begin_s)
    assert done.returncode == 0
    assert "train" in done.stdout
    assert "role" not in done.stdout
    assert min(times) < 0.5


def test_parsing_imports_nothing_heavy() -> None:
    loaded = modules_after("from dapo_hpc import cli; cli.parser()")
    assert loaded.isdisjoint({*HEAVY, "pydantic", "rich", "numpy"})


@pytest.mark.parametrize(
    "module", ["dapo_hpc.launch.session", "dapo_hpc.observe.status", "dapo_hpc.roles.buffer"]
)
def test_launcher_status_and_buffer_start_without_torch(module: str) -> None:
    loaded = modules_after(f"import {module}")
    assert loaded.isdisjoint({"torch", "vllm", "megatron", "transformers"})


def test_check_lists_every_problem_and_exits_2(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('[run]\nname = "r"\n[loss]\nclip_hi = 1\n[model]\n[prompts]\ntrain = "a"\n')
    done = dapo("check", str(path))
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert all(line.startswith("bad.toml: ") for line in lines)
    text = done.stderr
    assert "run.total_steps is missing" in text
    assert "model.path is missing" in text
    assert "did you mean loss.clip_high?" in text


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_config_passes_check(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(path)]) == 0
    assert "no problems" in capsys.readouterr().out


def test_train_with_missing_files_makes_no_run_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(ROOT / "configs" / "demo.toml"), "--set", f"run.dir={tmp_path}"]
    words += ["--set", f"model.path={tmp_path}/none", "--set", f"prompts.train={tmp_path}/none"]
    assert cli.main(words) == 2
    assert "model.path = " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_resume_does_not_take_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--resume", str(tmp_path), "--set", "run.seed=1"]) == 2
    assert "--set cannot be used with --resume" in capsys.readouterr().err


def test_sft_wants_its_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sft", str(ROOT / "configs" / "qwen2.5_32b_dapo.toml")]) == 2
    assert "needs an [sft] section" in capsys.readouterr().err


def test_a_role_that_fails_says_why_in_its_last_line(tmp_path: Path) -> None:
    done = dapo("role", "prompts", "--run", str(tmp_path))
    assert done.returncode == 3, "to start it again would not help"
    assert "there is no such file" in done.stderr.splitlines()[-1]


def test_demo_data_is_a_command(tmp_path: Path) -> None:
    done = dapo("demo-data", str(tmp_path / "d"), "--seed", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4000 training prompts" in done.stdout
    names = {path.name for path in (tmp_path / "d").iterdir()}
    assert names == {"model", "sft.parquet", "train.parquet", "heldout.parquet"}
