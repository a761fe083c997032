"""Everything a plan says, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dapo_hpc.config import RunConfig
from dapo_hpc.plan.architecture import Architecture, find
from dapo_hpc.plan.disk import DiskUse, disk_use
from dapo_hpc.plan.engine import EngineMemory, can_split, engine_memory, engine_problems
from dapo_hpc.plan.layout import layout_problems
from dapo_hpc.plan.memory import (
    GIB,
    RankMemory,
    device_of,
    largest_micro_batch,
    learner_memory,
)
from dapo_hpc.plan.remedies import cheapest, num_gpus, peak
from dapo_hpc.plan.step import StepCounts, count_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run needs, and why it cannot be."""

    config: RunConfig
    step: StepCounts
    architecture: Architecture | None
    """None, as are the following: no config.json was found."""
    learner: list[RankMemory] | None
    """By pipeline stage."""
    engine: EngineMemory | None
    disk: DiskUse | None
    learner_problems: list[str]
    """Sentences; a run with any of them would not start, or would die."""
    engine_problems: list[str]
    """The same, of the actors."""
    notes: list[str]

    @property
    def problems(self) -> list[str]:
        return [*self.learner_problems, *self.engine_problems]

    @property
    def learner_processes(self) -> int:
        return num_gpus(self.config.learner)

    @property
    def actor_gpus(self) -> int:
        return self.config.rollout.num_actors * self.config.rollout.tensor_parallel

    def nodes(self, gpus: int) -> int:
        """Whole nodes; 0 without GPUs."""
        each = self.config.hardware.gpus_per_node
        return -(-gpus // each) if each else 0


def make_plan(config: RunConfig, beside: Path) -> Plan:
    """The plan of a config whose TOML file lies in `beside`. Never raises for what does not fit:
    that is in `problems`."""
    notes, unreadable = _notes(config), []
    architecture = None
    try:
        architecture = find(config, beside)
        notes += [] if architecture else [_absent(config)]
    except ValueError as problem:
        unreadable = [str(problem)]
    problems = unreadable + layout_problems(architecture, config.learner)
    learner = engine = disk = None
    engine_side: list[str] = []
    if architecture is not None:
        if not problems:
            learner = learner_memory(architecture, config)
            problems += _learner_problems(architecture, config, learner)
        engine_side = engine_problems(architecture, config)
        if can_split(architecture, config.rollout.tensor_parallel):
            engine = engine_memory(architecture, config)
        disk = disk_use(architecture, config)
    return Plan(
        config=config,
        step=count_step(config),
        architecture=architecture,
        learner=learner,
        engine=engine,
        disk=disk,
        learner_problems=problems,
        engine_problems=engine_side,
        notes=notes,
    )


def _learner_problems(
    architecture: Architecture, config: RunConfig, stages: list[RankMemory]
) -> list[str]:
    """That a stage does not fit, its shares, and the cheapest layout that does."""
    limit_gib = config.hardware.gpu_memory_gib
    worst = max(stages, key=lambda stage: stage.total)
    if device_of(config) == "cpu" or worst.total <= limit_gib * GIB:
        return []
    named = {
        "weights": worst.weights,
        "gradients": worst.gradients,
        "optimizer": worst.optimizer,
        "reference policy": worst.reference,
        "train batch": worst.train_batch,
        "activations": worst.activations,
        "log-prob chunk" if worst.head > worst.backward else "backward of a layer": worst.passing,
        "allowance": worst.allowance,
    }
    shares = ", ".join(f"{name} {size / GIB:.1f}" for name, size in named.items() if size)
    remedy = cheapest(architecture, config)
    change = "No change of the layout makes it fit: take larger GPUs, or shorter responses."
    if remedy is not None:
        change = f"Cheapest change: {remedy.text()}."
    return [
        f"a learner GPU needs {peak(stages) / GIB:.1f} GiB and has "
        f"hardware.gpu_memory_gib = {limit_gib:g} (pipeline stage {stages.index(worst) + 1} of "
        f"{len(stages)}: {shares}). {change}"
    ]


def _absent(config: RunConfig) -> str:
    return (
        f"no plan of memory and disk: {config.model.path} holds no config.json yet, here or beside "
        "the TOML file."
    )


def _notes(config: RunConfig) -> list[str]:
    learner, found = config.learner, []
    if learner.micro_batch_tokens < config.max_sequence_tokens:
        found.append(
            f"learner.micro_batch_tokens = {learner.micro_batch_tokens} is less than the longest "
            f"prompt and response ({config.max_sequence_tokens}): a longer one is a micro-batch "
            f"alone, and memory is planned for {largest_micro_batch(config)} tokens."
        )
    each = config.hardware.gpus_per_node
    widest = {
        "learner.tensor_parallel": learner.tensor_parallel,
        "rollout.tensor_parallel": config.rollout.tensor_parallel,
    }
    for name, ranks in widest.items():
        if each and ranks > each:
            found.append(
                f"{name} = {ranks} reaches beyond one node of {each} GPUs: every layer then waits "
                "for the network between nodes."
            )
    return found
