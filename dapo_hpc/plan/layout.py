"""What the learner cannot train in a layout. `dapo check`, the launcher and the learner ask here:
all of them refuse the same in the same words."""

from __future__ import annotations

from dapo_hpc.config import Frozen, LearnerSection
from dapo_hpc.plan.architecture import Architecture


def layout_problems(architecture: Architecture | None, learner: LearnerSection) -> list[str]:
    """Sentences; empty for a layout that the learner can train the model in.

    Args:
        architecture: of the model; None where it is not known.
        learner: section of the config.
    """
    found = _expert_problems(learner)
    if architecture is None:
        return found
    frozen = Frozen.of(learner.freeze)
    found += _split_problems(architecture, learner)
    return found + frozen.problems(num_layers=architecture.num_layers, is_tied=architecture.is_tied)


def _expert_problems(learner: LearnerSection) -> list[str]:
    if learner.expert_parallel == 1:
        return []
    return [
        f"learner.expert_parallel = {learner.expert_parallel}: the models that the learner trains "
        "are dense and have no experts to split. Set it to 1."
    ]


def _split_problems(architecture: Architecture, learner: LearnerSection) -> list[str]:
    found = []
    split = {
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": architecture.kv_heads,
        "intermediate_size": architecture.ffn,
    }
    for name, size in split.items():
        if size % learner.tensor_parallel:
            found.append(
                f"learner.tensor_parallel = {learner.tensor_parallel} does not divide {name} = "
                f"{size} of {architecture.name}. Set it to a divisor."
            )
    if architecture.num_layers % learner.pipeline_parallel:
        found.append(
            f"learner.pipeline_parallel = {learner.pipeline_parallel} does not divide the "
            f"{architecture.num_layers} layers of {architecture.name}. Set it to a divisor."
        )
    return found
