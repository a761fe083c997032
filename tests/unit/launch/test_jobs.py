"""Which jobs a run consists of, and what does not fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dapo_hpc.config import ConfigProblems, RunConfig, parse
from dapo_hpc.launch.jobs import JobSpec, Origin, belongs_to, comment, fit_problems, job_specs
from dapo_hpc.launch.site import Site

HERE = Path("/home/me/work")
RUN = HERE / "runs" / "least"
LEAST = {
    "run": {"name": "least", "total_steps": 1},
    "model": {"path": "model"},
    "prompts": {"train": "train.parquet", "eval": "eval.parquet"},
}


def config(**sections: dict[str, Any]) -> RunConfig:
    return parse({**LEAST, **sections})


def site(learner: dict[str, Any] | None = None, actors: dict[str, Any] | None = None) -> Site:
    node = {"gpus_per_node": 8, "cpus_per_node": 96, "memory_gib": 960, "time_limit": "24:00:00"}
    tables = {"learner": {**node, **(learner or {})}, "actors": {**node, **(actors or {})}}
    return Site.model_validate({"name": "here", **tables})


def specs(config: RunConfig, site: Site) -> dict[str, JobSpec]:
    found = job_specs(config, site, RUN, Origin(directory=HERE))
    return {spec.kind: spec for spec in found}


@pytest.mark.parametrize(
    ("layout", "table", "nodes", "ranks", "gpus"),
    [
        ({"tensor_parallel": 8, "pipeline_parallel": 2}, {}, 2, 8, 8),
        ({"tensor_parallel": 4}, {}, 1, 4, 4),
        ({"tensor_parallel": 4}, {"exclusive": True}, 1, 4, 8),
        ({"data_parallel": 8}, {"ranks_per_node": 4}, 2, 4, 4),
        ({"tensor_parallel": 2, "context_parallel": 4, "data_parallel": 3}, {}, 3, 8, 8),
    ],
    ids=["fills two nodes", "half a node", "half, but whole", "fewer on more", "with context"],
)
def test_learner_nodes(
    layout: dict[str, int], table: dict[str, Any], nodes: int, ranks: int, gpus: int
) -> None:
    learner = specs(config(learner=layout), site(table))["learner"]
    assert (learner.nodes, learner.tasks_per_node, learner.gpus_per_node) == (nodes, ranks, gpus)


def test_a_share_of_the_gpus_brings_that_share_of_cores_and_memory() -> None:
    whole = specs(config(rollout={"num_actors": 4}), site(actors={"actors_per_job": 2}))["actors"]
    assert (whole.elements, whole.gpus_per_node, whole.gpus) == (2, 2, 4)
    assert (whole.cpus_per_task, whole.memory_gib) == (12, 240)
    table = {"actors_per_job": 2, "exclusive": True}
    whole = specs(config(rollout={"num_actors": 4}), site(actors=table))["actors"]
    assert (whole.gpus_per_node, whole.cpus_per_task, whole.memory_gib) == (8, 48, 960)


def test_without_gpus_a_job_takes_what_the_table_says() -> None:
    on_processors = config(hardware={"gpus_per_node": 0}, learner={"data_parallel": 2})
    none = {"gpus_per_node": 0, "cpus_per_node": 4, "memory_gib": 0}
    found = specs(on_processors, site(none, none))
    assert (found["learner"].nodes, found["learner"].tasks_per_node) == (1, 2)
    assert (found["learner"].cpus_per_task, found["learner"].gpus_per_node) == (2, 0)
    spread = specs(on_processors, site({**none, "ranks_per_node": 1}, none))["learner"]
    assert (spread.nodes, spread.tasks_per_node) == (2, 1)


@pytest.mark.parametrize(
    ("sections", "tables", "sentence"),
    [
        ({"learner": {"tensor_parallel": 8, "pipeline_parallel": 3}}, ({"ranks_per_node": 7}, {}),
         "24 ranks"),
        ({"rollout": {"tensor_parallel": 16}}, ({}, {}), "needs 16 GPUs"),
        ({"rollout": {"tensor_parallel": 4, "num_actors": 3}}, ({}, {"actors_per_job": 3}),
         "needs 12 GPUs"),
        ({"rollout": {"num_actors": 6}}, ({}, {"actors_per_job": 4}), "Set it to 4 or 8"),
        ({"rollout": {"num_actors": 1001}}, ({}, {}), "Raise actors.actors_per_job"),
        ({"hardware": {"gpus_per_node": 4}}, ({}, {}), "`dapo check` would plan for other nodes"),
        ({}, ({}, {"gpus_per_node": 0}), "either on GPUs or on processors"),
    ],
    ids=["ranks", "engine", "engines", "part of a job", "array", "hardware", "mixed"],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_a_sentence(
    sections: dict[str, Any], tables: tuple[dict[str, Any], dict[str, Any]], sentence: str
) -> None:
    with pytest.raises(ConfigProblems, match=sentence) as caught:
        specs(config(**sections), site(*tables))
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("name", ["a b", "a|b", "a%j", "a'b", "ä"])
def test_a_run_directory_that_a_script_cannot_name_is_refused(name: str) -> None:
    found = fit_problems(config(), site(), Path("/scratch") / name / "least")
    assert len(found) == 1
    assert "batch script" in found[0]


def test_paths_are_relative_below_the_directory_of_submission_and_absolute_elsewhere() -> None:
    origin = Origin(directory=HERE, config=HERE / "configs/a.toml", site=Path("/etc/dapo/s.toml"))
    learner, actors = job_specs(config(), site(), RUN, origin)
    assert learner.words == (
        "dapo", "job", "learner", "--run", "runs/least", "--site", "/etc/dapo/s.toml",
        "--config", "configs/a.toml",
    )  # fmt: skip
    assert "--config" not in actors.words
    elsewhere = job_specs(config(), site(), Path("/scratch/least"), origin)[0]
    assert elsewhere.words[4] == "/scratch/least"


def test_a_job_belongs_to_the_run_its_comment_names_from_where_it_was_submitted() -> None:
    said = comment(Path("runs/least"))
    assert belongs_to(RUN, job_comment=said, directory=str(HERE))
    assert not belongs_to(RUN, job_comment=said, directory="/home/me/elsewhere")
    assert belongs_to(RUN, job_comment=comment(RUN), directory="/anywhere")
    assert not belongs_to(RUN, job_comment="", directory=str(RUN))
    assert not belongs_to(RUN, job_comment="night:runs/least", directory=str(HERE))


def test_the_buffer_comes_first_where_it_is_a_job() -> None:
    table = {"cpus_per_node": 2, "memory_gib": 8, "time_limit": "1-0"}
    with_buffer = Site.model_validate({**site().model_dump(), "buffer": table})
    found = job_specs(config(), with_buffer, RUN, Origin(directory=HERE))
    assert [spec.kind for spec in found] == ["buffer", "learner", "actors"]
    assert (found[0].gpus_per_node, found[0].cpus_per_task) == (0, 2)
    assert "buffer" not in found[1].title
