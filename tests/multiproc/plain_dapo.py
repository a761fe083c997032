"""DAPO's rollout step on transformers and torch alone: the truth for what Megatron trains.

Nothing of dapo_hpc computes here. Batches come as records; the objective, its four denominators,
clipping and AdamW are written out. A mini-batch is one padded batch: attention is causal, so what
stands to the right of a sequence changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dapo_hpc.records import Group

TEMPERATURE = 0.8
LR, WARMUP_STEPS = 2e-3, 2
BETA1, BETA2, EPS = 0.9, 0.999, 1e-3
"""eps is large, so that one step of Adam is a smooth function of the gradient: its slope is at most
lr / eps, where 1e-8 would turn the rounding of a gradient near 0 into a step of lr."""
WEIGHT_DECAY = 0.1
GRAD_CLIP = 0.5
CLIP_LOW, CLIP_HIGH, DUAL_CLIP, CAP, KL_COEF = 0.2, 0.28, 1.5, 1.5, 0.05
MAX_RESPONSE_TOKENS = 16


@dataclass(frozen=True)
class Recipe:
    """How much is trained, on which denominator."""

    steps: int
    mini_batches: int
    normalization: str

    @property
    def num_updates(self) -> int:
        return self.steps * self.mini_batches


@dataclass
class Trained:
    """What came of every update."""

    losses: list[float]
    sizes: list[float]
    """Sum of the sizes of the loss's terms; empty where only the sum is known."""
    norms: list[float]
    """Of the gradients before clipping."""
    gradients: list[dict[str, Tensor]]
    """Before clipping, by Hugging Face name."""
    parameters: list[dict[str, Tensor]]
    """After the update."""


class _AllIn(TorchFunctionMode):
    """transformers computes norms, rotations and softmax in float32 whatever the model is in."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args = tuple(self._widened(value) for value in args)
        kwargs = {name: self._widened(value) for name, value in (kwargs or {}).items()}
        if func is Tensor.float:
            return args[0].to(self._dtype)
        return func(*args, **kwargs)

    def _widened(self, value: Any) -> Any:
        return self._dtype if value is torch.float32 else value


def train(
    directory: Path, batches: list[list[Group]], recipe: Recipe, seed: int, dtype: torch.dtype
) -> Trained:
    """Train the model in `directory` on one batch of groups after the other."""
    with _AllIn(dtype):
        learner = _Learner(directory, dtype)
        for step, groups in enumerate(batches, 1):
            order = np.random.default_rng(seed + step).permutation(len(groups))
            count = recipe.mini_batches
            cuts = [len(groups) * i // count for i in range(count + 1)]
            minis = [[groups[i] for i in order[a:b]] for a, b in zip(cuts, cuts[1:], strict=False)]
            with torch.no_grad():
                old = [learner.logprobs(mini, learner.model) for mini in minis]
            for mini, before in zip(minis, old, strict=True):
                learner.update(mini, before, recipe.normalization, LR * min(1, step / WARMUP_STEPS))
    return learner.trained


class _Learner:
    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model, self.start = (
            load(directory, attn_implementation="eager").to(dtype) for _ in range(2)
        )
        self.trained = Trained([], [], [], [], [])
        self.moments = {
            name: (torch.zeros_like(p), torch.zeros_like(p))
            for name, p in self.model.named_parameters()
        }

    def logprobs(self, groups: list[Group], model: Any) -> list[Tensor]:
        """[tokens of the response] of each response in order, with gradient."""
        sequences = [
            (len(group.prompt.token_ids), np.concatenate((group.prompt.token_ids, r.token_ids)))
            for group in groups
            for r in group.responses
        ]
        ids = torch.zeros(len(sequences), max(len(s) for _, s in sequences), dtype=torch.int64)
        for place, (_, sequence) in zip(ids, sequences, strict=True):
            place[: len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
        every = torch.log_softmax(model(ids).logits / TEMPERATURE, -1)
        chosen = every[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        return [chosen[i, n - 1 : len(s) - 1] for i, (n, s) in enumerate(sequences)]

    def update(self, groups: list[Group], old: list[Tensor], normalization: str, lr: float) -> None:
        with torch.no_grad():
            ref = self.logprobs(groups, self.start)
        self.model.zero_grad(set_to_none=False)
        terms = list(_terms(groups, self.logprobs(groups, self.model), old, ref, normalization))
        loss = torch.stack([part.sum() for part in terms]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        self._adamw(gradients, min(1.0, GRAD_CLIP / (float(norm) + 1e-6)), lr)
        found = self.trained
        found.losses.append(loss.item())
        found.sizes.append(sum(part.abs().sum().item() for part in terms))
        found.norms.append(float(norm))
        found.gradients.append({name: g.double() for name, g in gradients.items()})
        found.parameters.append(
            {name: p.detach().double().clone() for name, p in self.model.named_parameters()}
        )

    @torch.no_grad()
    def _adamw(self, gradients: dict[str, Tensor], scale: float, lr: float) -> None:
        t = len(self.trained.losses) + 1
        for name, parameter in self.model.named_parameters():
            gradient = gradients[name] * scale
            first, second = self.moments[name]
            first.mul_(BETA1).add_(gradient, alpha=1 - BETA1)
            second.mul_(BETA2).add_(gradient * gradient, alpha=1 - BETA2)
            if parameter.ndim > 1:  # norms and biases do not decay
                parameter.mul_(1 - lr * WEIGHT_DECAY)
            size = (second / (1 - BETA2**t)).sqrt() + EPS
            parameter.sub_(lr * (first / (1 - BETA1**t)) / size)


def _terms(
    groups: list[Group],
    now: list[Tensor],
    old: list[Tensor],
    ref: list[Tensor],
    normalization: str,
) -> Iterator[Tensor]:
    """The weighted loss of every trained token, by response."""
    responses = [(group, r) for group in groups for r in group.responses]
    masks = [
        torch.from_numpy(np.isfinite(r.rollout_logprobs)) & (r.finish_reason != "length")
        for _, r in responses
    ]
    counts = [int(mask.sum()) for mask in masks]
    of_group = {
        group.group_id: sum(
            n for n, (g, _) in zip(counts, responses, strict=True) if g.group_id == group.group_id
        )
        for group in groups
    }
    num_responses = sum(n > 0 for n in counts)
    num_groups = sum(n > 0 for n in of_group.values())
    for i, (group, response) in enumerate(responses):
        if not counts[i]:
            continue
        weight = {
            "global_tokens": 1 / sum(counts),
            "per_prompt": 1 / num_groups / of_group[group.group_id],
            "per_sequence": 1 / num_responses / counts[i],
            "per_sequence_const": 1 / num_responses / MAX_RESPONSE_TOKENS,
        }[normalization]
        rewards = np.array([r.reward for r in group.responses])
        advantage = float((response.reward - rewards.mean()) / (rewards.std(ddof=1) + 1e-6))
        sampled = torch.from_numpy(response.rollout_logprobs).to(now[i].dtype)
        columns = (column[i][masks[i]] for column in (now, old, ref))
        yield weight * _token_losses(*columns, sampled[masks[i]], advantage)


def _token_losses(
    now: Tensor, old: Tensor, ref: Tensor, sampled: Tensor, advantage: float
) -> Tensor:
    """Clip-higher with a dual clip, importance weights and the k3 penalty."""
    ratio = (now - old).exp()
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    if advantage < 0:
        loss = loss.clamp(max=-advantage * DUAL_CLIP)
    importance = (old - sampled).exp().clamp(max=CAP)
    return importance * loss + KL_COEF * ((ref - now).exp() - (ref - now) - 1)
