"""The output layer, replaced by ours: logits of the full vocabulary never exist at once.

Before each forward pass of the model the head is given one job, which says what becomes of the
hidden states of that micro-batch:

    Score  -> log-probs and entropy, with gradient if the model has one: for any loss
    Train  -> DAPO's loss, its gradients formed at once: three GEMMs where a general loss takes four

Only the places that somebody wants go through the output layer, the same ones for both jobs and by
the same operations. So scored and trained log-probs have the same bits, and the ratio before the
first update is exactly 1.

Legend: T places of a micro-batch, TP tensor-parallel ranks, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from dapo_hpc.config import LossSection
from dapo_kernels import DapoLossStats, linear_dapo_loss, linear_logprob


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Which log-probs of a micro-batch are wanted."""

    token_ids: Tensor
    """[T] int64: the token whose log-prob each place gives."""
    places: Tensor | None
    """Ascending int64: the wanted places; the others cost nothing and give 0. None: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What the loss of a micro-batch needs beside the current log-probs: [T] float32 each."""

    old_logprobs: Tensor
    """Nats; the policy's before the step's first update."""
    rollout_logprobs: Tensor | None
    """Nats; the engine's. None: no importance weights."""
    ref_logprobs: Tensor | None
    """Nats; the reference policy's. None: there is none."""
    advantages: Tensor
    token_weights: Tensor
    """Mask and denominator; 0 outside of Targets.places."""
    rule: LossSection
    """Clips, cap and coefficient."""


@dataclass(frozen=True, slots=True)
class Score:
    """Turn hidden states into [T, 1, 2] float32: log-probs and entropy, nats."""

    targets: Targets
    temperature: float | None = None
    """Instead of the head's own."""


@dataclass(slots=True)
class Train:
    """Turn hidden states into the loss [1, 1, 1] float32, a shape that Megatron hands on.

    The gradient of the output weight goes to its main_grad in the forward pass. So whatever comes
    after must leave the loss as it is: the upstream gradient must be 1.
    """

    targets: Targets
    inputs: LossInputs
    stats: DapoLossStats | None = None
    """Filled in by the forward pass."""


class LogprobHead(ColumnParallelLinear):  # type: ignore[misc]  # Megatron has no types
    """Megatron's output layer with another forward pass; same parameters, hooks and checkpoints."""

    job: Score | Train | None = None
    """Of the next forward pass, which takes it away: none is done twice."""
    temperature: float = 1.0
    valid_vocab: int = 0
    """Rows of the full weight that are real tokens; the rest pads it to a multiple of TP."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, None]:
        """Hidden [T, 1, H] (a T / TP part under sequence parallelism) -> what the job says."""
        job, self.job = self.job, None
        if job is None or runtime_gather_output is not None:
            raise ValueError("LogprobHead needs a job before each forward, and gathers nothing.")
        hidden = input_.reshape(-1, input_.shape[-1])
        matrix = self.weight if weight is None else weight  # tied embeddings pass theirs
        if isinstance(job, Train):
            loss, job.stats = self._loss(hidden, matrix, job)
            return loss.reshape(1, 1, 1), None
        logprobs, entropy = linear_logprob(
            hidden,
            matrix,
            job.targets.token_ids,
            temperature=self.temperature if job.temperature is None else job.temperature,
            rows=job.targets.places,
            **self._sharding(),
        )
        return torch.stack((logprobs, entropy), dim=-1).unsqueeze(1), None

    def _loss(self, hidden: Tensor, matrix: Tensor, job: Train) -> tuple[Tensor, DapoLossStats]:
        inputs, rule = job.inputs, job.inputs.rule
        return linear_dapo_loss(
            hidden,
            matrix,
            job.targets.token_ids,
            inputs.old_logprobs,
            inputs.rollout_logprobs,
            inputs.advantages,
            inputs.token_weights,
            clip_low=rule.clip_low,
            clip_high=rule.clip_high,
            dual_clip=rule.dual_clip,
            importance_cap=rule.importance_cap,
            ref_logprobs=inputs.ref_logprobs,
            kl_coef=rule.kl_coef,
            temperature=self.temperature,
            rows=job.targets.places,
            **self._sharding(),
        )

    def _sharding(self) -> dict[str, Any]:
        """Who holds which part of weight and hidden states, and sums the latter's gradient."""
        return {
            "valid_vocab": self.valid_vocab,
            "group": self.tp_group,
            "hidden_grad": "reduce_scatter" if self.sequence_parallel else "all_reduce",
        }


def install(model: Any, *, temperature: float, valid_vocab: int) -> LogprobHead:
    """Turn the output layer of a GPTModel (last stage) into a LogprobHead, in place."""
    layer = model.output_layer
    layer.__class__ = LogprobHead
    layer.temperature, layer.valid_vocab = temperature, valid_vocab
    return layer  # type: ignore[no-any-return]
