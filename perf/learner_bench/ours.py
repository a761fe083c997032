"""This tree's learner on one rank: a session as a run has it, and its own `score` and `update`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dapo_hpc.config import RunConfig, parse
from dapo_hpc.learner.batch import Micro, TrainBatch, build
from dapo_hpc.learner.optimizer import Optimizer, Update
from dapo_hpc.learner.packing import plan_step
from dapo_hpc.learner.parallel import Layout, connect
from dapo_hpc.learner.report import UpdateFigures
from dapo_hpc.learner.session import Session, open_session
from dapo_hpc.learner.step import score, update
from dapo_hpc.run_dir import RunDir

from .batch import draw, summaries
from .clock import Laps
from .task import Job

SEED = 0


class Learner:
    """One rank of our learner with a batch of one mini-batch on its device."""

    def __init__(self, job: Job, rank: int, folder: Path) -> None:
        """Meets the other ranks in `folder`. Collective."""
        layout = Layout(tensor=job.tensor, pipeline=job.pipeline, data=job.data)
        address = folder / "rank0.json" if layout.world > 1 else None
        self.here = connect(layout, rank, address, threads=job.threads)
        config = config_of(job, folder)
        nobody: Any = None  # a buffer, which scoring and updates do not ask
        self.session = open_session(RunDir(folder), config, self.here, nobody)
        self.batch = batch_of(job, config, self.session)
        self.device = self.here.device

    def step(self) -> Laps:
        laps = Laps(self.device)
        score(self.session, self.batch, policy_step=0)
        laps.end("score")
        optimizer = self.session.optimizer
        stopping: Any = OptimizerWithLap(optimizer, laps)
        self.session.optimizer = stopping
        self.figures = UpdateFigures(self.device)
        (mini_batch,) = self.batch.mini_batches
        update(self.session, mini_batch, self.session.config.optimizer.lr, self.figures, at="bench")
        self.session.optimizer = optimizer
        laps.end("optimizer")
        return laps

    def check(self) -> dict[str, float]:
        """Of the last step: what every team must agree on. Collective."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        if self.here.reports:
            for micro in self.batch.micros():
                mask = micro.tokens.loss_mask
                total += torch.stack((_old(micro)[mask].sum(), mask.sum())).double()
        logprobs, tokens = self.here.sum_over_ranks(total).tolist()
        (done,) = self.figures.updates
        return {"mean_logprob": logprobs / tokens, "tokens": tokens, "grad_norm": done.grad_norm}


class OptimizerWithLap:
    """The optimizer, which stops the clock where the backward pass ends."""

    def __init__(self, optimizer: Optimizer, laps: Laps) -> None:
        self._optimizer, self._laps = optimizer, laps

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self, lr: float, *, at: str) -> Update:
        self._laps.end("update")
        return self._optimizer.step(lr, at=at)


def config_of(job: Job, folder: Path) -> RunConfig:
    """DAPO with one optimizer step for each batch; all that is not said here is the default."""
    load = job.load
    return parse(
        {
            "run": {"name": "bench", "dir": str(folder), "total_steps": 1, "seed": SEED},
            "model": {"path": str(job.model), "dtype": job.dtype},
            "prompts": {"train": "nothing.parquet", "max_tokens": load.max_prompt_tokens},
            "rollout": {
                "prompts_per_step": load.prompts,
                "group_size": load.group_size,
                "max_response_tokens": load.max_response_tokens,
            },
            "reward": {"overlong_punishment": False},
            "loss": {"importance_sampling": "off"},
            "learner": {
                "mini_batches": 1,
                "micro_batch_tokens": load.micro_batch_tokens,
                "tensor_parallel": job.tensor,
                "pipeline_parallel": job.pipeline,
                "data_parallel": job.data,
                "threads": job.threads,
            },
            "eval": {"every": 0},
        }
    )


def batch_of(job: Job, config: RunConfig, session: Session) -> TrainBatch:
    """This rank's share, packed as a run packs it."""
    groups = draw(job.load, job.architecture.vocab, SEED)
    summed = summaries(groups)
    plan = plan_step(
        summed,
        mini_batches=1,
        micro_batch_tokens=job.load.micro_batch_tokens,
        data_parallel=job.data,
        seed=SEED,
    )
    return build(session.policy, config, plan, summed, dict(enumerate(groups)))


def _old(micro: Micro) -> torch.Tensor:
    assert micro.old_logprobs is not None, "the rank that reports has scored"
    return micro.old_logprobs
