"""`dapo check --build`: every rank's model as Megatron builds it, held against the plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dapo_hpc.config import RunConfig
from dapo_hpc.learner.meta_model import RankModel, dry_run
from dapo_hpc.learner.model import DTYPES
from dapo_hpc.learner.parallel import Layout
from dapo_hpc.plan import Plan
from dapo_hpc.plan.architecture import Architecture
from dapo_hpc.plan.parameters import rank_parameters, stages
from dapo_hpc.weights import families


def with_build(plan: Plan) -> Plan:
    """The plan with what came of building the learner's ranks on the meta device.

    A note says what was built; what Megatron or transformers refuses is a problem. Nothing is built
    while the learner's side of the plan has problems.
    """
    if plan.learner_problems:
        return plan
    if plan.architecture is None:
        where = plan.config.model.path
        return _refused(plan, f"--build needs {where}/config.json, and there is none.")
    try:
        hf = families.read_config(Path(plan.architecture.file).parent)
        ranks = dry_run(hf, Layout.of(plan.config.learner), dtype=DTYPES[plan.config.model.dtype])
    except ValueError as problem:
        return _refused(plan, str(problem))
    _compare(ranks, plan.architecture, plan.config)
    most = max(rank.num_parameters for rank in ranks)
    note = (
        f"built without memory: {len(ranks)} ranks of at most {most:,} parameters, of the shapes "
        "that they load and as many as planned."
    )
    return replace(plan, notes=[*plan.notes, note])


def _refused(plan: Plan, problem: str) -> Plan:
    return replace(plan, learner_problems=[*plan.learner_problems, problem])


def _compare(ranks: list[RankModel], architecture: Architecture, config: RunConfig) -> None:
    """An error of this program, not of a config, when they differ."""
    planned = stages(architecture, config.learner)
    for rank in ranks:
        stage = planned[rank.pipeline_rank]
        held = rank_parameters(architecture, config.learner, stage).held
        assert rank.num_parameters == held, (
            f"dapo_hpc/plan and Megatron disagree about stage {rank.pipeline_rank}: {held} and "
            f"{rank.num_parameters} parameters on a rank"
        )
