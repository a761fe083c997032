"""Memory of a learner rank at the moment it needs most, share by share."""

from __future__ import annotations

from dataclasses import dataclass, fields

from dapo_hpc.config import RunConfig
from dapo_hpc.plan.activations import (
    FLOAT32,
    Device,
    Passes,
    angle_bytes,
    ends_bytes,
    layer_bytes,
)
from dapo_hpc.plan.architecture import Architecture
from dapo_hpc.plan.parameters import Parameters, Stage, rank_parameters, stages
from dapo_hpc.plan.passing import backward_bytes, gathered_bytes, head_bytes
from dapo_hpc.plan.step import count_step

GIB = 2**30
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
"""By model.dtype."""
MOMENTS_BYTES = 8
"""Adam's two moments of a parameter, float32."""
CONTEXT_BYTES = 3 * GIB
"""Allowance, not measured: CUDA context, libraries, buffers of NCCL, and what a GPU that is sold
with 80 GB lacks of 80 GiB."""
FRAGMENTATION_FRAC = 0.1
"""Allowance, not measured: of everything whose size changes from micro-batch to micro-batch."""
TOKEN_BYTES = 45
"""On the device for each token of a train batch (learner.packing.MicroBatch)."""
ROW_TOKEN_BYTES = 36
"""The same (learner.forward.Row)."""
SCORE_BYTES = 8
"""Log-prob and entropy of a token from scoring, on the last stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes on each rank of a pipeline stage."""

    weights: int
    gradients: int
    """Float32, whatever the weights are."""
    optimizer: int
    """Adam's moments, and float32 main parameters of bfloat16 ones."""
    reference: int
    """Second copy of the weights, for loss.kl_coef above 0."""
    train_batch: int
    """Tokens, masks and weights of all micro-batches of a step, at full length."""
    activations: int
    """Kept for the backward passes of the micro-batches in flight."""
    head: int
    """While a chunk of log-probs is formed."""
    backward: int
    """While a layer goes backward, recomputed if it is."""
    allowance: int
    """Not derived: CUDA context and libraries, fragmentation."""

    @property
    def passing(self) -> int:
        """The larger of what is never there at the same time."""
        return max(self.head, self.backward)

    @property
    def total(self) -> int:
        every = sum(int(getattr(self, field.name)) for field in fields(self))
        return every - min(self.head, self.backward)


def learner_memory(architecture: Architecture, config: RunConfig) -> list[RankMemory]:
    """One for each pipeline stage. The layout must be one that the model can be split by."""
    passes = passes_of(architecture, config)
    return [
        _stage_memory(architecture, config, passes, stage)
        for stage in stages(architecture, config.learner)
    ]


def passes_of(architecture: Architecture, config: RunConfig) -> Passes:
    """The largest micro-batch: the token budget, or one sequence that is longer."""
    learner = config.learner
    tokens = -(-largest_micro_batch(config) // learner.context_parallel)
    ranks = learner.tensor_parallel if learner.sequence_parallel else 1
    return Passes(
        architecture=architecture,
        learner=learner,
        element_bytes=ELEMENT_BYTES[config.model.dtype],
        device=device_of(config),
        tokens=-(-tokens // ranks) * ranks,
    )


def largest_micro_batch(config: RunConfig) -> int:
    """Tokens; a sequence longer than the budget is a micro-batch alone."""
    return max(config.learner.micro_batch_tokens, config.max_sequence_tokens)


def device_of(config: RunConfig) -> Device:
    return "cuda" if config.hardware.gpus_per_node else "cpu"


def optimizer_bytes(config: RunConfig, trained: int) -> int:
    """Of all that the optimizer keeps of as many parameters."""
    main = FLOAT32 if config.model.dtype == "bfloat16" else 0
    return trained * (main + MOMENTS_BYTES)


def _stage_memory(
    architecture: Architecture, config: RunConfig, passes: Passes, stage: Stage
) -> RankMemory:
    learner = config.learner
    parameters = rank_parameters(architecture, learner, stage)
    weights = parameters.held * passes.element_bytes
    activations = _in_flight(config, stage) * (
        stage.num_layers * layer_bytes(passes, learner.recompute)
        + angle_bytes(passes)
        + ends_bytes(passes, is_last=stage.is_last)
    )
    activations += gathered_bytes(passes)
    head = head_bytes(passes) if stage.is_last else 0
    backward = backward_bytes(passes, stage)
    train_batch = _train_batch_bytes(config, stage)
    return RankMemory(
        weights=weights,
        gradients=parameters.trained * FLOAT32,
        optimizer=_optimizer_share(config, parameters),
        reference=weights if config.loss.kl_coef else 0,
        train_batch=train_batch,
        activations=activations,
        head=head,
        backward=backward,
        allowance=_allowance(passes.device, train_batch + activations + max(head, backward)),
    )


def _in_flight(config: RunConfig, stage: Stage) -> int:
    """Micro-batches whose backward pass is still to come; Megatron's schedule, one forward, one
    backward."""
    return min(stage.count - stage.index, count_step(config).max_micro_batches)


def _optimizer_share(config: RunConfig, parameters: Parameters) -> int:
    learner = config.learner
    whole = optimizer_bytes(config, parameters.trained)
    if not learner.distributed_optimizer:
        return whole
    return -(-whole // (learner.data_parallel * learner.context_parallel))


def _train_batch_bytes(config: RunConfig, stage: Stage) -> int:
    scores = SCORE_BYTES * (1 + bool(config.loss.kl_coef)) * stage.is_last
    tokens = -(-count_step(config).max_rank_tokens // config.learner.context_parallel)
    return tokens * (TOKEN_BYTES + ROW_TOKEN_BYTES + scores)


def _allowance(device: Device, changing: int) -> int:
    return 0 if device == "cpu" else CONTEXT_BYTES + round(FRAGMENTATION_FRAC * changing)
