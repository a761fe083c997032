"""AdamW on Megatron's optimizer, with an own norm, own clipping and a guard against bad gradients.

Megatron decides which numbers this rank updates: the parameters themselves in float32, float32 main
parameters beside bfloat16 ones; all of them, or with learner.distributed_optimizer this
data-parallel rank's part. The update is torch's fused AdamW on every host, whether or not
TransformerEngine or Apex are there: one result, and one layout of the state.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from dapo_hpc.config import OptimizerSection
from dapo_hpc.learner import cpu
from dapo_hpc.learner.model import Policy

CLIP_EPS = 1e-6
"""Added to the norm before dividing by it, as torch and Megatron do."""
MOMENTS = ("exp_avg", "exp_avg_sq")

log = logging.getLogger(__name__)


class TooManySkippedUpdates(RuntimeError):
    """One gradient after the other is not finite; the weights are as the last good one left them.

    A person must look: going on would skip every update to come.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamSettings:
    """What a phase (reinforcement learning, supervised fine-tuning) fixes for all its updates."""

    weight_decay: float
    """Not applied to norms and biases."""
    beta1: float
    beta2: float
    eps: float
    grad_clip: float
    """Largest global gradient norm."""
    max_skipped_updates: int = 5
    """After so many in a row `step` raises."""

    @classmethod
    def of(cls, section: OptimizerSection, *, weight_decay: float) -> AdamSettings:
        return cls(
            weight_decay=weight_decay,
            beta1=section.beta1,
            beta2=section.beta2,
            eps=section.eps,
            grad_clip=section.grad_clip,
            max_skipped_updates=section.max_skipped_updates,
        )


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer step did."""

    grad_norm: float
    """Before clipping; not finite when the update was skipped."""
    is_skipped: bool


@dataclass(frozen=True, slots=True)
class Shard:
    """What this rank updates of one parameter, and what it remembers for that."""

    name: str
    """Megatron's name of the parameter."""
    parameter: Tensor
    start: int
    """First number that is this rank's, in the flattened parameter."""
    main: Tensor
    """Float32; the parameter's own memory if that is float32."""
    moments: dict[str, Tensor]
    """Of MOMENTS, float32, as large as `main`."""

    @property
    def has_main_copy(self) -> bool:
        """True beside a bfloat16 parameter."""
        return self.main.dtype != self.parameter.dtype


class Optimizer:
    """Steps a Policy. To be built after the policy's weights are loaded."""

    def __init__(self, policy: Policy, settings: AdamSettings) -> None:
        self._policy, self._settings = policy, settings
        # Shards of parameters are views of them, which autograd need not follow.
        with torch.no_grad(), cpu.cuda_calls_on_cpu():
            self.megatron: Any = get_megatron_optimizer(
                _megatron_config(policy), [policy.ddp], use_gloo_process_groups=False
            )
        (self._single,) = self.megatron.chained_optimizers
        self._adam = _fused_adamw(self._single.optimizer.param_groups, settings)
        self._single.optimizer = self._adam
        self._start_moments()
        self.shards = list(self._find_shards())
        self.num_updates = 0
        """Done so far, skipped ones not counted."""
        self.num_skipped_in_a_row = 0

    def zero_grad(self) -> None:
        """Before the first micro-batch of a mini-batch."""
        self._policy.ddp.zero_grad_buffer()
        self.megatron.zero_grad()

    @torch.no_grad()
    def step(self, lr: float, *, at: str = "an update") -> Update:
        """Clip the accumulated gradients and update, or skip if their norm is not finite.

        Every rank does the same: the norm is that of all ranks. A skipped update leaves parameters
        and moments as they are.

        Args:
            lr: learning rate.
            at: which update this is, for a person who reads that it was skipped.

        Raises:
            TooManySkippedUpdates: this is number max_skipped_updates in a row.
        """
        self.megatron.prepare_grads()
        norm = self._norm()
        if not math.isfinite(norm):
            self._skip(norm, at)
            return Update(norm, is_skipped=True)
        self._clip(norm)
        for group in self._adam.param_groups:
            group["lr"] = lr
            # Megatron applies wd_mult only in its own scheduler, which is not used here.
            group["weight_decay"] = self._settings.weight_decay * group["wd_mult"]
        self.megatron.step_with_ready_grads()
        self.num_updates += 1
        self.num_skipped_in_a_row = 0
        return Update(norm, is_skipped=False)

    @torch.no_grad()
    def resume(self, num_updates: int, num_skipped_in_a_row: int) -> None:
        """Go on from a checkpoint; main parameters and moments are in `shards` already."""
        self.num_updates, self.num_skipped_in_a_row = num_updates, num_skipped_in_a_row
        for state in self._adam.state.values():
            state["step"].fill_(num_updates)

    def _start_moments(self) -> None:
        for group in self._adam.param_groups:
            for main in group["params"]:
                state = self._adam.state[main]
                state["step"] = torch.zeros((), dtype=torch.float32, device=main.device)
                for name in MOMENTS:
                    state[name] = torch.zeros_like(main, dtype=torch.float32)

    def _find_shards(self) -> Iterator[Shard]:
        for name, parameter in self._policy.module.named_parameters():
            if parameter.requires_grad:
                for start, main in self._mains_of(parameter):
                    moments = {moment: self._adam.state[main][moment] for moment in MOMENTS}
                    yield Shard(name, parameter, start, main, moments)

    def _mains_of(self, parameter: Tensor) -> list[tuple[int, Tensor]]:
        """Where this rank's part of a parameter starts, and that part; empty if it has none."""
        if not self._policy.is_optimizer_distributed:
            return [(0, getattr(parameter, "main_param", parameter))]
        place = self._single.model_param_group_index_map.get(parameter)
        if place is None:
            return []
        group, number = place
        part = self._single._get_model_param_range_map(parameter)["param"]
        return [(part.start, self._adam.param_groups[group]["params"][number])]

    def _norm(self) -> float:
        """Global L2 norm, each number counted once.

        Megatron leaves out what tensor-parallel ranks hold in common and second copies of tied
        embeddings; they count as 0, or as nan if one of them has gone wrong alone. The group is
        that of the ranks among which the rest is split.
        """
        counted = self._single.get_main_grads_for_grad_norm()
        known = {id(grad) for grad in counted}
        copies = [grad for grad in self._grads() if id(grad) not in known]
        total = torch.zeros((), device=self._policy.processes.device)
        for grads, factor in ((counted, 1.0), (copies, 0.0)):
            if grads:
                norms = torch.stack(list(torch._foreach_norm(grads)))
                total += norms.float().square().sum() * factor
        group = self._single.get_grad_stats_parallel_group()
        if group.size() > 1:
            dist.all_reduce(total, group=group)
        return float(total.sqrt())

    def _grads(self) -> list[Tensor]:
        return [shard.main.grad for shard in self.shards if shard.main.grad is not None]

    def _clip(self, norm: float) -> None:
        scale = self._settings.grad_clip / (norm + CLIP_EPS)
        if scale < 1.0 and self.shards:
            torch._foreach_mul_(self._grads(), scale)

    def _skip(self, norm: float, at: str) -> None:
        self.num_skipped_in_a_row += 1
        count, limit = self.num_skipped_in_a_row, self._settings.max_skipped_updates
        sentence = f"{at}: the gradient norm is {norm} ({self._culprits()})"
        limits = f"{count} in a row; optimizer.max_skipped_updates = {limit}"
        if count < limit:
            log.warning("%s. The update is skipped (%s).", sentence, limits)
            return
        raise TooManySkippedUpdates(
            f"{sentence}, and so it was in the updates before ({limits}). Look at "
            "learner/grad_norm, learner/ratio_mean and mismatch/max_diff of the steps before: if "
            "they grow, lower optimizer.lr; if they do not, a batch or a checkpoint holds numbers "
            "that are not finite."
        )

    def _culprits(self) -> str:
        """For a person: which parameters' gradients are not finite."""
        pairs = [(shard.name, shard.main.grad) for shard in self.shards]
        bad = [name for name, grad in pairs if grad is not None and not grad.isfinite().all()]
        return f"on this rank in {len(bad)} parameters{f', first {bad[0]}' if bad else ''}"


def _fused_adamw(groups: list[dict[str, Any]], settings: AdamSettings) -> torch.optim.AdamW:
    """Of Megatron's groups of parameters; how they are updated is in the settings alone."""
    return torch.optim.AdamW(
        [{"params": group["params"], "wd_mult": group["wd_mult"]} for group in groups],
        lr=0.0,  # set before each step, as is weight_decay
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def _megatron_config(policy: Policy) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=0.0,
        clip_grad=0.0,  # clipped here
        params_dtype=policy.dtype,
        bf16=policy.dtype == torch.bfloat16,
        fp16=False,
        use_distributed_optimizer=policy.is_optimizer_distributed,
    )
