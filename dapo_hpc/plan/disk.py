"""What a run writes, and how much of it lies there at a time."""

from __future__ import annotations

from dataclasses import dataclass

from dapo_hpc.config import RunConfig
from dapo_hpc.plan.architecture import Architecture
from dapo_hpc.plan.memory import ELEMENT_BYTES, optimizer_bytes
from dapo_hpc.plan.parameters import Stage, model_elements, rank_parameters
from dapo_hpc.plan.step import count_step

PAYLOAD_TOKEN_BYTES = 8
"""Of a sampled token in the buffer's segments: its id and its log-prob."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUse:
    """Bytes. Sizes of single things, and of all that are kept at a time, the one being written
    included."""

    version: int
    """One set of weights for the actors."""
    versions: int
    checkpoint: int
    checkpoints: int
    step_payload: int
    """Responses of one train batch, at full length. Groups that do not train come on top until
    they are sorted out."""
    payload: int
    """Of the steps that a retained checkpoint may ask for again."""

    @property
    def total(self) -> int:
        return self.versions + self.checkpoints + self.payload


def disk_use(architecture: Architecture, config: RunConfig) -> DiskUse:
    learner, e = config.learner, ELEMENT_BYTES[config.model.dtype]
    version = model_elements(architecture) * e
    whole = Stage(0, 1, 0, architecture.num_layers)
    one_rank = learner.model_copy(update={"tensor_parallel": 1, "pipeline_parallel": 1})
    trained = rank_parameters(architecture, one_rank, whole).trained
    checkpoint = version + optimizer_bytes(config, trained)
    tokens = count_step(config).responses * config.rollout.max_response_tokens
    step_payload = tokens * PAYLOAD_TOKEN_BYTES
    return DiskUse(
        version=version,
        versions=(config.weights.keep_versions + 1) * version,
        checkpoint=checkpoint,
        checkpoints=(learner.keep_checkpoints + 1) * checkpoint,
        step_payload=step_payload,
        payload=step_payload * learner.checkpoint_every * learner.keep_checkpoints,
    )
