"""Site files: what they say, and every problem of one at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dapo_hpc.config import ConfigProblems
from dapo_hpc.config.loading import keys_of
from dapo_hpc.launch.site import Site, load_site, time_limit_s

ROOT = Path(__file__).resolve().parents[3]
LEAST = """
name = "least"
[learner]
cpus_per_node = 2
time_limit = "1:00:00"
[actors]
cpus_per_node = 2
time_limit = "1:00:00"
"""


def load(tmp_path: Path, text: str) -> Site:
    path = tmp_path / "here.toml"
    path.write_text(text)
    return load_site(path)


def problems(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(ConfigProblems) as caught:
        load(tmp_path, text)
    return caught.value.problems


def test_least_site_has_the_stated_defaults(tmp_path: Path) -> None:
    site = load(tmp_path, LEAST)
    assert site.jobs_may_submit
    assert site.buffer is None
    assert set(site.tables()) == {"learner", "actors"}
    assert (site.handover.signal, site.handover.before_s) == ("USR2", 300)
    assert site.environment.passed == ("HOME", "USER", "PATH", "LANG")


SHIPPED = sorted((ROOT / "slurm" / "sites").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_site_is_read_and_bears_the_name_of_its_file(path: Path) -> None:
    assert load_site(path).name == path.stem


@pytest.mark.parametrize("file", ["slurm/sites/example.toml", "docs/slurm.md"])
def test_every_key_is_shown_in_the_example_and_in_the_document(file: str) -> None:
    text = (ROOT / file).read_text()
    keys = {key.rpartition(".")[2] for key in keys_of(Site)}
    assert {key for key in keys if not re.search(rf"\b{key}\b", text)} == set()


def test_optional_lines_of_the_example_can_be_uncommented(tmp_path: Path) -> None:
    text = (ROOT / "slurm" / "sites" / "example.toml").read_text()
    every = re.sub(r"^# (?=\w+ = |\[)", "", text, flags=re.MULTILINE)
    assert every.count("\n# ") == 2, "only the head stays a comment"
    assert load(tmp_path, every).buffer is not None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("24:00:00", 86400),
        ("2-0", 172800),
        ("2-12:30", 217800),
        ("2-12:30:15", 217815),
    ],
)
def test_time_limits_in_slurms_six_notations(text: str, seconds: int) -> None:
    assert time_limit_s(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "24:00:00:00", "-1", "1-2-3", "UNLIMITED"])
def test_other_time_limits_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Slurm's notation"):
        time_limit_s(text)


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    text = LEAST.replace('"1:00:00"', '"1 hour"', 1).replace("[actors]", "[actors]\ngpu_per_node=8")
    found = problems(tmp_path, text + "[handover]\nsignal = 'KILL'\n")
    assert len(found) == 3
    assert found[0].startswith("learner.time_limit = '1 hour': expected Slurm's notation")
    assert found[1] == "unknown key actors.gpu_per_node; did you mean actors.gpus_per_node?"
    assert found[2].startswith("handover.signal = 'KILL'")


@pytest.mark.parametrize(
    ("addition", "sentence"),
    [
        ("[handover]\nbefore_s = 3600", "hand over before it has worked"),
        ("[handover]\ndrain_s = 400", "time limit would come before the work is put away"),
        ("[environment]\npassed = ['HF_TOKEN']", "HF_TOKEN looks like a secret"),
        ("[environment.variables]\nWANDB_API_KEY = 'x'", "WANDB_API_KEY looks like a secret"),
        ("[network]\nport_range = [20, 10]", "first port is above the last"),
        ("[environment.variables]\n'A B' = 'x'", "A B"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, addition: str, sentence: str) -> None:
    assert any(sentence in problem for problem in problems(tmp_path, LEAST + addition))


def test_gpu_type_and_ranks_need_gpus(tmp_path: Path) -> None:
    text = LEAST.replace("[learner]", "[learner]\ngpu_type = 'h100'")
    assert "gpus_per_node is 0" in problems(tmp_path, text)[0]
    text = LEAST.replace("[learner]", "[learner]\ngpus_per_node = 4\nranks_per_node = 8")
    assert "every rank has a GPU of its own" in problems(tmp_path, text)[0]


def test_no_such_file_and_not_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigProblems, match="no such file"):
        load_site(tmp_path / "none.toml")
    assert problems(tmp_path, "name = ")[0].startswith("not TOML")
