"""Tiny learners on real gloo ranks: one batch for every layout, and all they hold in one place.

What ranks hold in shards is compared as whole tensors with Hugging Face names, which
`Policy.export` puts together: so a mistake in where a shard lies cannot cancel itself by being made
twice, in writing a checkpoint and in reading it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import Tensor

from dapo_hpc.learner.forward import forward_backward, row
from dapo_hpc.learner.model import DTYPES, Policy
from dapo_hpc.learner.optimizer import MOMENTS, AdamSettings, Optimizer, Update
from dapo_hpc.learner.parallel import Layout, Processes, connect, disconnect
from dapo_hpc.weights.source import SafetensorsSource
from tests.learner_parts import VOCAB, make_model

MODELS = {"tied": ("qwen3", True), "biased": ("qwen2", False)}
"""Name -> family, tied embeddings."""
LENGTHS = ((7, 12, 5), (20,), (3, 9, 8, 6), (11, 13))
"""Of the sequences of each micro-batch; even sums, as sequence parallelism needs."""
LR = 1e-2
GRAD_CLIP = 0.5
"""Clips: norms of these models are above 1."""

Whole = dict[str, Tensor]
"""Hugging Face name -> whole tensor."""


@dataclass(frozen=True)
class Case:
    """A learner."""

    model: str
    layout: Layout = Layout()
    dtype: str = "float32"
    distributed: bool = False
    sequence_parallel: bool = False
    recompute: Any = "none"
    freeze: tuple[str, ...] = ()
    grad_clip: float = GRAD_CLIP

    @property
    def name(self) -> str:
        sizes = f"{self.layout.tensor}{self.layout.pipeline}{self.layout.data}"
        marks = ("distributed", self.distributed), ("sequence", self.sequence_parallel)
        words = [self.model, sizes, self.dtype, *(mark for mark, is_on in marks if is_on)]
        return "-".join([*words, self.recompute, *self.freeze, f"{self.grad_clip:g}"])

    def build(self, root: Path, here: Processes) -> tuple[Policy, Optimizer]:
        policy = Policy(
            root / self.model,
            here,
            dtype=DTYPES[self.dtype],
            temperature=1.0,
            sequence_parallel=self.sequence_parallel,
            recompute=self.recompute,
            distributed_optimizer=self.distributed,
            freeze=self.freeze,
        )
        policy.load(SafetensorsSource(root / self.model))
        settings = AdamSettings(
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            grad_clip=self.grad_clip,
            max_skipped_updates=3,
        )
        return policy, Optimizer(policy, settings)


def backward(policy: Policy, optimizer: Optimizer, seed: int) -> None:
    """Gradients of a weighted sum of log-probs, the same for every layout."""
    rng = np.random.default_rng(seed)
    data = policy.processes.layout.data
    mine = range(policy.processes.data_rank, len(LENGTHS), data)
    drawn = [
        (rng.integers(3, VOCAB, (2, sum(lengths))), rng.normal(0, 1, sum(lengths)) / 100)
        for lengths in LENGTHS
    ]
    rows = [row(policy, *drawn[i][0], np.array(LENGTHS[i])) for i in mine]
    weights = [torch.from_numpy(drawn[i][1]).float() for i in mine]
    optimizer.zero_grad()
    forward_backward(policy, rows, lambda number, lp, _: (-(lp * weights[number]).sum(), None))


def update(policy: Policy, optimizer: Optimizer, seed: int) -> Update:
    backward(policy, optimizer, seed)
    return optimizer.step(LR)


def whole_state(policy: Policy, optimizer: Optimizer) -> dict[str, Whole]:
    """Parameters, main parameters and moments, whole, on rank 0. Collective.

    Everything that is not a parameter takes the parameters' place for a while. Float32 numbers fit
    into three bfloat16 ones: 8 bits each of 24.
    """
    found = {"parameters": dict(policy.export())}
    kept = [parameter.detach().clone() for parameter in policy.module.parameters()]
    for name in ("main", *MOMENTS):
        rests = [_state(shard, name) for shard in optimizer.shards]
        for part in range(3):
            found[f"{name}/{part}"] = _exported(policy, optimizer, rests)
            rests = [rest - rest.to(policy.dtype).float() for rest in rests]
    for parameter, value in zip(policy.module.parameters(), kept, strict=True):
        parameter.data.copy_(value)
    return found


def _state(shard: Any, name: str) -> Tensor:
    tensor: Tensor = shard.main if name == "main" else shard.moments[name]
    return tensor.detach().clone().view(-1)


def _exported(policy: Policy, optimizer: Optimizer, runs: list[Tensor]) -> Whole:
    for parameter in policy.module.parameters():
        parameter.data.zero_()
    for shard, run in zip(optimizer.shards, runs, strict=True):
        place = shard.parameter.data.view(-1)[shard.start : shard.start + run.numel()]
        place.copy_(run)
    if policy.is_optimizer_distributed:
        policy.ddp.start_param_sync(force_sync=True)
    return {name: tensor.clone() for name, tensor in policy.export()}


def same(first: dict[str, Whole], second: dict[str, Whole]) -> bool:
    """Bit by bit."""
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[kind][name])
        for kind, tensors in first.items()
        for name, tensor in tensors.items()
    )


def largest_difference(first: Whole, second: Whole) -> float:
    """Over all tensors, relative to the largest number of each."""
    assert first.keys() == second.keys()
    return max(
        float((first[name] - second[name]).abs().max() / second[name].abs().max().clamp(min=1e-12))
        for name in first
    )


# ------------------------------------------------------------------ processes

Job = Callable[[Path, int], None]
"""(root, rank) -> nothing; results go to files below root."""


def start(job: Job, root: Path, num_ranks: int) -> None:
    """Run `job` on as many processes; below `root` lies a model of each kind."""
    for name, (family, tied) in MODELS.items():
        make_model(root / name, family, tied=tied)
    mp.spawn(_rank, args=(job, str(root)), nprocs=num_ranks)


def _rank(rank: int, job: Job, root: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    job(Path(root), rank)


class Connected:
    """`with Connected(layout, root, rank) as here`: meet the other ranks; None for the others."""

    def __init__(self, layout: Layout, root: Path, rank: int, name: str) -> None:
        self._layout, self._rank, self._address = layout, rank, root / f"{name}.json"

    def __enter__(self) -> Processes | None:
        if self._rank >= self._layout.world:
            return None
        address = self._address if self._layout.world > 1 else None
        self._here = connect(self._layout, self._rank, address)
        return self._here

    def __exit__(self, *_: object) -> None:
        if self._rank < self._layout.world:
            disconnect()
