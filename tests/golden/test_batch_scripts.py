"""Batch scripts, compared in full: those of several sites, and those that are shipped."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from dapo_hpc import cli
from dapo_hpc.config import load
from dapo_hpc.launch.jobs import job_specs, world_size
from dapo_hpc.launch.sbatch import file_name, script_text
from dapo_hpc.launch.site import load_site
from tests.golden import rewrite
from tests.golden.rewrite import EXAMPLE, EXAMPLE_CONFIG, ROOT, SCRIPTS, SHIPPED, scripts

CASES = dict(scripts())
SHIPPED_CASES = dict(rewrite.shipped_scripts())
TRAIN_CONFIG = ROOT / "configs" / "qwen2.5_7b_dapo.toml"


@pytest.mark.parametrize("name", CASES)
def test_script_is_the_recorded_one(name: str) -> None:
    record = SCRIPTS / name
    assert record.exists(), f"no record of {name}; `make golden` writes it"
    assert record.read_text() == CASES[name]


def test_no_script_is_left_over() -> None:
    assert {path.name for path in SCRIPTS.glob("*.sbatch")} == set(CASES)


@pytest.mark.parametrize("name", SHIPPED_CASES)
def test_shipped_script_is_that_of_the_example_site(name: str) -> None:
    assert (SHIPPED / name).read_text() == SHIPPED_CASES[name]


def test_dry_run_prints_the_shipped_scripts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["submit", str(EXAMPLE_CONFIG.relative_to(ROOT)), "--site"]
    assert cli.main([*words, str(EXAMPLE.relative_to(ROOT)), "--dry-run"]) == 0
    shipped = [
        f"==> {name} <==\n{(SHIPPED / name).read_text()}"
        for name in ("learner.sbatch", "actors.sbatch")
    ]
    assert capsys.readouterr().out == "\n".join(shipped)


def test_learner_script_is_the_same_with_a_buffer_job_but_for_its_title() -> None:
    with_buffer = rewrite.example_specs(rewrite.example_with_buffer())
    assert [spec.kind for spec in with_buffer] == ["buffer", "learner", "actors"]
    ours = script_text(with_buffer[1]).splitlines()
    shipped = (SHIPPED / "learner.sbatch").read_text().splitlines()
    assert [i for i, (a, b) in enumerate(zip(ours, shipped, strict=True)) if a != b] == [1]


def options(text: str) -> dict[str, str]:
    found = [line.removeprefix("#SBATCH --") for line in text.splitlines() if "#SBATCH" in line]
    return {option.partition("=")[0]: option.partition("=")[2] for option in found}


def test_train_script_asks_for_the_learner_nodes_and_the_actors_nodes() -> None:
    """It is written by hand, for the config that its head names, on the example site."""
    text = (SHIPPED / "train.sbatch").read_text()
    assert str(TRAIN_CONFIG.relative_to(ROOT)) in text
    config, site = load(TRAIN_CONFIG), load_site(EXAMPLE)
    origin = rewrite.Origin(directory=ROOT, site=EXAMPLE)
    learner = options(script_text(job_specs(config, site, ROOT / config.run_dir, origin)[0]))
    train = options(text)
    gpus = world_size(config) + config.rollout.num_actors * config.rollout.tensor_parallel
    assert int(train.pop("nodes")) == gpus / site.learner.gpus_per_node
    own = {"job-name", "output"}
    expected = {k: v for k, v in learner.items() if k not in {*own, "nodes", "comment"}}
    expected.pop("dependency")  # two runs by this script may run at the same time
    assert {k: v for k, v in train.items() if k not in own} == expected


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.sbatch")), ids=lambda path: path.name)
def test_shipped_script_is_bash_and_calls_a_command_there_is(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    assert "dirname" not in text, "sbatch copies the script elsewhere before it runs"
    assert 'cd "$SLURM_SUBMIT_DIR"' in text
    words = shlex.split(text.splitlines()[-1])
    assert words[:2] == ["exec", "dapo"]
    cli.parser().parse_args(words[2:])


def test_a_script_that_differs_is_noticed() -> None:
    spec = rewrite.example_specs(load_site(EXAMPLE))[0]
    changed = load_site(EXAMPLE).model_copy(update={"name": "other"})
    assert script_text(spec) == SHIPPED_CASES[file_name(spec)]
    table = changed.learner.model_copy(update={"time_limit": "23:00:00"})
    other = rewrite.example_specs(changed.model_copy(update={"learner": table}))[0]
    assert script_text(other) != SHIPPED_CASES[file_name(other)]
