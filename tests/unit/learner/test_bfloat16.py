"""bfloat16 parameters: float32 gradients, float32 main parameters, checkpoints of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch

from dapo_hpc.learner.checkpoint import Checkpoints, Progress
from dapo_hpc.learner.forward import forward_backward, row
from dapo_hpc.learner.model import Policy
from dapo_hpc.learner.optimizer import AdamSettings, Optimizer
from dapo_hpc.learner.parallel import Processes
from dapo_hpc.weights.source import SafetensorsSource
from tests.learner_parts import VOCAB, make_model


def build(model: Path, here: Processes, dtype: torch.dtype) -> tuple[Policy, Optimizer]:
    policy = Policy(model, here, dtype=dtype, temperature=1.0)
    policy.load(SafetensorsSource(model))
    settings = AdamSettings(weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8, grad_clip=1.0)
    return policy, Optimizer(policy, settings)


def backward(policy: Policy, optimizer: Optimizer) -> None:
    rng = np.random.default_rng(0)
    lengths = np.array([20, 9, 14])
    tokens, targets = (rng.integers(3, VOCAB, lengths.sum()) for _ in range(2))
    optimizer.zero_grad()
    packed = row(policy, tokens, targets, lengths)
    forward_backward(policy, [packed], lambda _n, lp, _e: (-lp.mean(), None))


def test_gradients_are_float32_and_near_those_of_float32(here: Processes, tmp_path: Path) -> None:
    make_model(tmp_path)
    norms = []
    for dtype in (torch.float32, torch.bfloat16):
        policy, optimizer = build(tmp_path, here, dtype)
        backward(policy, optimizer)
        assert all(p.main_grad.dtype == torch.float32 for p in policy.module.parameters())
        norms.append(optimizer.step(1e-3).grad_norm)
    assert norms[1] == pytest.approx(norms[0], rel=0.02)  # bfloat16 keeps 8 bits


def test_updates_too_small_for_bfloat16_add_up(here: Processes, tmp_path: Path) -> None:
    """At lr 1e-5 no single update changes a bfloat16 weight near 0.15; a hundred do."""
    make_model(tmp_path)
    policy, optimizer = build(tmp_path, here, torch.bfloat16)
    before = dict(policy.export())
    moved = []
    for updates in (1, 99):
        for _ in range(updates):
            backward(policy, optimizer)
            optimizer.step(1e-5)
        now = dict(policy.export())
        large = {n: before[n].abs() > 0.1 for n in before}
        moved.append(sum(int((now[n] != before[n])[large[n]].sum()) for n in before))
    assert moved[0] < 0.1 * moved[1]
    assert all(t.dtype == torch.bfloat16 for t in before.values())


def test_checkpoint_holds_the_main_parameters(here: Processes, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    policy, optimizer = build(tmp_path / "model", here, torch.bfloat16)
    backward(policy, optimizer)
    optimizer.step(1e-3)
    checkpoints = Checkpoints(tmp_path / "checkpoints", here, keep=1)
    checkpoints.save(policy, optimizer, Progress(step=1))
    resumed = build(tmp_path / "model", here, torch.bfloat16)
    assert checkpoints.load_newest(*resumed) == Progress(step=1)
    for one_policy, one_optimizer in ((policy, optimizer), resumed):
        backward(one_policy, one_optimizer)
        one_optimizer.step(1e-4)
    for mine, theirs in zip(main_parameters(optimizer), main_parameters(resumed[1]), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)


def main_parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    groups = optimizer.megatron.chained_optimizers[0].optimizer.param_groups
    return [parameter for group in groups for parameter in group["params"]]
