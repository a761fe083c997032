"""`dapo submit`: what it makes, what it refuses, and that twice is once."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from fake_slurm import FakeSlurm, install
from submitted_run import config_table, make_site, write_life

from dapo_hpc import cli, commands
from dapo_hpc.config import ConfigProblems
from dapo_hpc.launch import lives, prepare, slurm, submission
from dapo_hpc.launch.repair import read_origin
from dapo_hpc.launch.site import load_site
from dapo_hpc.run_dir import RunDir

ARCHITECTURE = """{
 "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
 "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16,
 "max_position_embeddings": 32768, "tie_word_embeddings": false
}"""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    return install(FakeSlurm(), monkeypatch)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with some.toml and site.toml, entered."""
    table = config_table(tmp_path, actors=2)
    table["run"]["dir"] = "runs"
    (tmp_path / "model" / "config.json").write_text(ARCHITECTURE)
    (tmp_path / "some.toml").write_text(tomli_w.dumps(table))
    site = make_site().model_dump(mode="json", exclude_none=True)
    (tmp_path / "site.toml").write_text(tomli_w.dumps(site))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def submit(*words: str) -> int:
    return cli.main(["submit", "some.toml", "--site", "site.toml", *words])


def test_submitting_makes_the_run_and_its_jobs(
    here: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit() == 0
    run = RunDir(here / "runs" / "some_run")
    said = capsys.readouterr().out
    assert "learner  job 1 submitted" in said
    assert "actors   job 2 submitted, 2 elements of the array" in said
    assert "dapo status runs/some_run" in said
    assert run.config.exists()
    assert run.auth.exists()
    assert run.logs.exists(), "Slurm makes no directory for its output"
    assert stat.S_IMODE(run.jobs.stat().st_mode) == 0o700
    assert load_site(run.jobs / "site.toml") == load_site(here / "site.toml")
    assert read_origin(run).directory == here
    assert [job.directory for job in fake.jobs] == [str(here)] * 3


@pytest.mark.usefixtures("here")
def test_submitting_again_submits_nothing(
    fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submit()
    fake.start_everything()
    assert submit() == 0
    assert len(fake.jobs) == 3
    said = capsys.readouterr().out
    assert "Nothing was missing." in said
    assert "actors   job 2_1 running" in said


def test_a_run_directory_can_be_submitted_too_and_a_stopped_run_goes_on(
    here: Path, fake: FakeSlurm
) -> None:
    submit()
    cli.main(["stop", "runs/some_run", "--now"])
    assert fake.jobs == []
    assert cli.main(["submit", "runs/some_run", "--site", "site.toml"]) == 0
    assert len(fake.jobs) == 3
    assert not lives.stop_requested(RunDir(here / "runs" / "some_run"))


def test_a_run_that_was_moved_is_submitted_where_it_lies(here: Path, fake: FakeSlurm) -> None:
    submit("--set", "run.total_steps=4")
    fake.jobs.clear()
    (here / "runs").rename(here / "elsewhere")
    site = make_site(storage={"runs": str(here / "scratch")})
    (here / "site.toml").write_text(tomli_w.dumps(site.model_dump(mode="json", exclude_none=True)))
    assert cli.main(["submit", "elsewhere/some_run", "--site", "site.toml"]) == 0
    assert {job.comment for job in fake.jobs} == {"dapo:elsewhere/some_run"}
    assert not (here / "scratch").exists()


def test_the_script_that_is_submitted_is_the_one_that_was_shown(
    here: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submit("--dry-run")
    shown = capsys.readouterr().out
    assert not (here / "runs").exists()
    assert fake.calls == []
    submit()
    for kind in ("learner", "actors"):
        text = (here / "runs" / "some_run" / "jobs" / f"{kind}.sbatch").read_text()
        assert f"==> {kind}.sbatch <==\n{text}" in shown


@pytest.mark.usefixtures("here")
def test_with_overrides_the_script_does_not_name_the_file_that_lacks_them(
    fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submit("--dry-run", "--set", "loss.clip_high=0.3")
    assert "--config" not in capsys.readouterr().out
    assert fake.calls == []


def test_a_run_that_something_else_trains_is_refused(
    here: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dapo train` on this machine, or one job with everything in it."""
    submit()
    fake.jobs.clear()
    run = RunDir(here / "runs" / "some_run")
    with prepare.lock_run(run):
        assert submit() == cli.BAD_INPUT
    assert "being trained by `dapo train`" in capsys.readouterr().err
    train = slurm.sbatch("#SBATCH --job-name=dapo-train\n", cwd=here)
    write_life(run, kind="train", job_id=train)
    assert submit() == cli.BAD_INPUT
    assert f"in one allocation, by job {train}" in capsys.readouterr().err
    fake.jobs.clear()
    assert submit() == 0


@pytest.mark.parametrize("change", [{"per_job": 2}, {"with_buffer": True}])
def test_a_site_that_changes_what_running_jobs_mean_is_refused(
    here: Path, fake: FakeSlurm, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    submit()
    text = tomli_w.dumps(make_site(**change).model_dump(mode="json", exclude_none=True))
    (here / "site.toml").write_text(text)
    assert submit() == cli.BAD_INPUT
    assert "Stop them first" in capsys.readouterr().err
    fake.jobs.clear()
    assert submit() == 0


@pytest.mark.usefixtures("here")
def test_a_changed_config_is_refused_with_the_key_that_differs(
    fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submit()
    assert submit("--set", "loss.clip_high=0.3") == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert "loss.clip_high is 0.28 there, and 0.3 here" in said
    assert "--set run.name=" in said
    assert fake.count("sbatch") == 2


def test_missing_files_are_refused_before_anything_is_made(
    here: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "train.parquet").unlink()
    assert submit() == cli.BAD_INPUT
    assert "prompts.train" in capsys.readouterr().err
    assert not (here / "runs").exists()
    assert fake.calls == []


def test_storage_runs_replaces_the_configs_directory(here: Path, fake: FakeSlurm) -> None:
    site = make_site(storage={"runs": str(here / "scratch")})
    text = tomli_w.dumps(site.model_dump(mode="json", exclude_none=True))
    (here / "site.toml").write_text(text)
    submit()
    assert (here / "scratch" / "some_run" / "config.toml").exists()
    assert len(fake.jobs) == 3


def test_a_command_that_jobs_would_not_find_is_refused(
    here: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: None)
    request = submission.from_files(here / "some.toml", here / "site.toml", [])
    with pytest.raises(ValueError, match="`dapo` is not in PATH"):
        submission.submit_scripts(request)
    assert fake.calls == []


@pytest.mark.usefixtures("here")
def test_a_refusal_of_slurm_is_told_and_the_next_submission_goes_on(
    fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.refusal = "Batch job submission failed: Invalid account or account/partition combination"
    assert submit() == cli.BAD_INPUT
    assert "Invalid account" in capsys.readouterr().err
    fake.refusal = ""
    assert submit() == 0
    assert len(fake.jobs) == 3


@pytest.mark.usefixtures("here")
def test_a_controller_that_is_away_is_waited_for(
    fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.away = 3
    assert submit() == 0
    fake.away = 10**6
    assert submit() == commands.UNAVAILABLE
    assert "the Slurm controller does not answer" in capsys.readouterr().err


def test_a_set_of_problems_is_told_at_once(here: Path, fake: FakeSlurm) -> None:
    site = make_site(per_job=3)
    text = tomli_w.dumps(site.model_dump(mode="json", exclude_none=True))
    (here / "site.toml").write_text(text)
    overrides = ["hardware.gpus_per_node=8"]
    request = submission.from_files(here / "some.toml", here / "site.toml", overrides)
    with pytest.raises(ConfigProblems) as caught:
        submission.dry_run(request)
    assert len(caught.value.problems) == 3
    assert fake.calls == []


def test_importing_the_launcher_imports_neither_submitit_nor_the_rest() -> None:
    code = (
        "import sys; from dapo_hpc.launch import submit; "
        "print([m for m in ('submitit', 'pydantic', 'torch', 'cryptography') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
