"""AdamW on Megatron's optimizer, with an own norm, own clipping and a guard against bad gradients.

In float32 this is Megatron's FP32Optimizer; in bfloat16 it keeps float32 main parameters. States
are whole on every data-parallel rank: without TransformerEngine or Apex, Megatron's distributed
optimizer writes checkpoints that it cannot read back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from dapo_hpc.learner import cpu
from dapo_hpc.learner.model import Policy

CLIP_EPS = 1e-6
"""Added to the norm before dividing by it, as torch and Megatron do."""


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


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer step did."""

    grad_norm: float
    """Before clipping; not finite when the update was skipped."""
    is_skipped: bool


class Optimizer:
    """Steps a Policy. To be built after the policy's weights are loaded."""

    def __init__(self, policy: Policy, settings: AdamSettings) -> None:
        self._policy, self._settings = policy, settings
        with cpu.cuda_calls_on_cpu():
            self.megatron: Any = get_megatron_optimizer(
                _megatron_config(policy.dtype, settings),
                [policy.ddp],
                use_gloo_process_groups=False,
            )
        (self._single,) = self.megatron.chained_optimizers
        self._start_moments()

    def zero_grad(self) -> None:
        """Before the first micro-batch of a mini-batch."""
        self._policy.ddp.zero_grad_buffer()
        self.megatron.zero_grad()

    @torch.no_grad()
    def step(self, lr: float) -> Update:
        """Clip the accumulated gradients and update, or skip if their norm is not finite."""
        self.megatron.prepare_grads()
        norm = self._norm()
        if not torch.isfinite(norm):
            return Update(float(norm), is_skipped=True)
        self._clip(float(norm))
        for group in self._groups:
            group["lr"] = lr
            # Megatron applies wd_mult only in its own scheduler, which is not used here.
            group["weight_decay"] = self._settings.weight_decay * group["wd_mult"]
        self.megatron.step_with_ready_grads()
        return Update(float(norm), is_skipped=False)

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what dist_checkpointing loaded for `megatron.sharded_state_dict`."""
        inner = state.get("optimizer", state)  # nested where there are float32 main parameters
        # Megatron leaves out a step count of 0, and torch insists on it.
        inner["state"].setdefault("common_step", torch.zeros(()))
        self.megatron.load_state_dict(state)

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._single.optimizer.param_groups  # type: ignore[no-any-return]

    def _start_moments(self) -> None:
        """Zero moments from the start, so that every checkpoint has the same entries."""
        state = self._single.optimizer.state
        for group in self._groups:
            group["fused"] = True
            for parameter in group["params"]:
                entry = state[parameter]
                device = parameter.device
                entry.setdefault("step", torch.zeros((), dtype=torch.float32, device=device))
                for name in ("exp_avg", "exp_avg_sq"):
                    if name not in entry:
                        entry[name] = torch.zeros_like(parameter, dtype=torch.float32)

    def _norm(self) -> Tensor:
        """Global L2 norm, each parameter counted once."""
        grads = self._single.get_main_grads_for_grad_norm()
        norms = torch._foreach_norm(grads) if grads else []
        total = torch.zeros((), device=self._policy.processes.device)
        if norms:
            total = torch.stack(list(norms)).float().square().sum()
        group = self._single.get_grad_stats_parallel_group()
        if group.size() > 1:
            dist.all_reduce(total, group=group)
        return total.sqrt()

    def _clip(self, norm: float) -> None:
        scale = self._settings.grad_clip / (norm + CLIP_EPS)
        if scale < 1.0:
            grads = [p.grad for p in self._single.get_parameters() if p.grad is not None]
            torch._foreach_mul_(grads, scale)


def _megatron_config(dtype: torch.dtype, settings: AdamSettings) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=0.0,  # set before each step
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=0.0,  # clipped here
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=False,
        use_distributed_optimizer=False,
    )
