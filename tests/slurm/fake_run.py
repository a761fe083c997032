"""A run of fake roles as real Slurm jobs: its directory and its site file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tomli_w

from dapo_hpc.run_dir import RunDir, write_json
from tests.buffer_process import ROOT, make_run

GROUP_SIZE = 4
BATCH_GROUPS = 8
MAX_STALENESS = 4
LEASE_S = 3.0
PART_OF_A_NODE = {"cpus_per_node": 4, "memory_gib": 1, "time_limit": "01:00:00"}


def make_fake_run(directory: Path, *, actors: int, **changes: object) -> RunDir:
    """Prompts are prepared, model and data empty; changes are given as section__key=value."""
    for name in ("train.parquet", "eval.parquet"):
        (directory / name).touch()
    (directory / "model").mkdir()
    run = make_run(
        directory,
        num_prompts=2000,
        run__dir=str(directory),
        run__total_steps=10**7,
        model__path=str(directory / "model"),
        prompts__train=str(directory / "train.parquet"),
        prompts__eval=str(directory / "eval.parquet"),
        hardware__gpus_per_node=0,
        rollout__prompts_per_step=BATCH_GROUPS,
        rollout__group_size=GROUP_SIZE,
        rollout__num_actors=actors,
        buffer__lease_s=LEASE_S,
        buffer__max_staleness=MAX_STALENESS,
        **changes,
    )
    write_json(run.env, {"kind": "train", "started": "now", "host": "here", "commit": None})
    return run


def write_fake_site(path: Path, *, variables: dict[str, str] | None = None, **tables: Any) -> Path:
    """A site file of the mini cluster whose steps run the fake roles; tables are merged in."""
    site: dict[str, Any] = {
        "name": "fake",
        "learner": {"partition": "learner", **PART_OF_A_NODE},
        "actors": {"partition": "rollout", **PART_OF_A_NODE},
        "handover": {"before_s": 30, "drain_s": 5},
        "environment": {
            "prefix": [sys.executable, "-m", "tests.slurm.fake_roles"],
            "passed": ["HOME", "PATH", "SLURM_CONF"],
            "lines": [f'export PATH="{Path(sys.executable).parent}:$PATH"'],
            "variables": {"PYTHONPATH": str(ROOT), **(variables or {})},
        },
    }
    for name, table in tables.items():
        site[name] = {**site.get(name, {}), **table}
    path.write_text(tomli_w.dumps(site))
    return path
