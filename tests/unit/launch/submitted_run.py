"""A run directory and a site as `dapo submit` finds or leaves them, without models or data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dapo_hpc.config import dump, parse
from dapo_hpc.launch.jobs import Origin
from dapo_hpc.launch.lives import Life, LifeRecord
from dapo_hpc.launch.repair import keep_origin, keep_site
from dapo_hpc.launch.site import Site
from dapo_hpc.run_dir import RunDir, write_json

NOW = 1_000_000.0
"""Unix seconds."""
LEARNER = LifeRecord(
    kind="learner",
    job_id="1",
    array_job_id=None,
    task=0,
    restart=0,
    nodes=("n1", "n2"),
    gpus=16,
    first_actor=None,
    started_unix_s=NOW - 7200,
    seen_unix_s=NOW - 5,
    phase="running",
    cause="",
    step_at_start=0,
)
NODE = {"cpus_per_node": 4, "time_limit": "1:00:00"}


def make_site(
    *, per_job: int = 1, successors: int = 0, with_buffer: bool = False, **top: Any
) -> Site:
    """A site of processors."""
    table: dict[str, Any] = {
        "name": "here",
        "learner": {**NODE, "successors": successors},
        "actors": {**NODE, "actors_per_job": per_job},
        **top,
    }
    return Site.model_validate({**table, "buffer": NODE} if with_buffer else table)


def config_table(directory: Path, actors: int) -> dict[str, Any]:
    """Its files exist, and are empty."""
    for name in ("train.parquet", "eval.parquet"):
        (directory / name).touch()
    (directory / "model").mkdir(exist_ok=True)
    return {
        "run": {"name": "some_run", "total_steps": 3, "dir": str(directory / "runs")},
        "model": {"path": str(directory / "model")},
        "prompts": {
            "train": str(directory / "train.parquet"),
            "eval": str(directory / "eval.parquet"),
        },
        "rollout": {"num_actors": actors},
        "hardware": {"gpus_per_node": 0},
    }


def make_run(directory: Path, site: Site, *, actors: int = 4) -> RunDir:
    """As after `dapo submit`, with no job submitted yet."""
    run = RunDir(directory / "runs" / "some_run")
    run.root.mkdir(parents=True)
    run.config.write_text(dump(parse(config_table(directory, actors))))
    write_json(run.env, {"kind": "train", "started": "now", "host": "here", "commit": None})
    keep_site(run, site)
    keep_origin(run, Origin(directory=directory))
    return run


def write_life(run: RunDir, **changes: Any) -> None:
    """The file of a job, of the learner on two nodes with sixteen GPUs unless said otherwise."""
    record = replace(LEARNER, **changes)
    (run.jobs / "lives").mkdir(exist_ok=True)
    Life(run, record, clock=lambda: record.seen_unix_s).write()
