"""The run directory before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dapo_hpc.config import RunConfig, load, parse
from dapo_hpc.launch import local, prepare
from dapo_hpc.plan.remedies import num_gpus
from dapo_hpc.run_dir import RunDir


def config(tmp_path: Path, **run: object) -> RunConfig:
    table = {
        "run": {"name": "r", "dir": str(tmp_path), "total_steps": 1, **run},
        "model": {"path": "models/m"},
        "prompts": {"train": "a.parquet", "eval": "b.parquet"},
    }
    return parse(table)


def test_config_in_the_run_directory_is_valid_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, resolved = prepare.create_run(config(tmp_path), "train")
    assert load(run.config) == resolved
    assert resolved.model.path == str(tmp_path / "models" / "m")
    assert resolved.prompts.eval == str(tmp_path / "b.parquet")
    assert resolved.rollout == config(tmp_path).rollout


def test_existing_run_is_refused_and_the_sentence_says_how_to_go_on(tmp_path: Path) -> None:
    run, _ = prepare.create_run(config(tmp_path), "train")
    before = run.config.read_bytes()
    with pytest.raises(prepare.RunExists, match=r"dapo train --resume .*/r") as caught:
        prepare.create_run(config(tmp_path, seed=5), "train")
    assert "--set run.name=" in str(caught.value)
    assert run.config.read_bytes() == before


def test_open_run_wants_a_run_of_its_kind(tmp_path: Path) -> None:
    run, _ = prepare.create_run(config(tmp_path), "sft")
    assert prepare.open_run(run.root, "sft")[0] == run
    with pytest.raises(ValueError, match="a run of `dapo sft`, not of `dapo train`"):
        prepare.open_run(run.root, "train")
    with pytest.raises(ValueError, match=r"holds no config\.toml"):
        prepare.open_run(tmp_path / "nowhere", "train")


def test_two_launchers_cannot_hold_one_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with prepare.lock_run(run), pytest.raises(prepare.RunExists, match="another launcher"):
        prepare.lock_run(run)
    prepare.lock_run(run).close()


def test_environment_record_shows_nothing_that_is_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVICE_TOKEN", "hush-hush")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run, _ = prepare.create_run(config(tmp_path), "train")
    text = run.env.read_text()
    assert "hush-hush" not in text
    record = json.loads(text)
    assert record["environment"]["OMP_NUM_THREADS"] == "7"
    assert record["packages"]["pydantic"]


def test_every_missing_file_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    table = config(tmp_path).model_dump()
    table["model"]["path"] = str(tmp_path / "there")
    files = ("model.path", "prompts.train", "prompts.eval")
    assert prepare.missing_files(RunConfig.model_validate(table), files) == [
        "prompts.train = 'a.parquet': there is no such file or directory.",
        "prompts.eval = 'b.parquet': there is no such file or directory.",
    ]


def test_as_many_learners_are_started_as_the_layout_has_ranks(tmp_path: Path) -> None:
    parallel = pytest.importorskip("dapo_hpc.learner.parallel", reason="torch is not installed")
    sizes = {"tensor": 2, "pipeline": 3, "data": 5, "context": 7}
    found = config(tmp_path)
    learner = found.learner.model_copy(update={f"{n}_parallel": s for n, s in sizes.items()})
    found = found.model_copy(update={"learner": learner})
    commands = local.rank_commands(RunDir(tmp_path), found, "learner")
    assert len({command.name for command in commands}) == len(commands) == 2 * 3 * 5 * 7
    assert all(command.words[-1] == "210" for command in commands)
    layout = parallel.Layout.of(learner)
    assert layout == parallel.Layout(**sizes)
    assert layout.world == num_gpus(learner) == 210
