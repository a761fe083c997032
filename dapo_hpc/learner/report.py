"""The figures of one rollout step: gathered on every rank, summed once, named at the end."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dapo_hpc.learner.batch import TrainBatch
from dapo_hpc.learner.optimizer import Update
from dapo_hpc.learner.parallel import Processes
from dapo_hpc.records import GroupSummary
from dapo_kernels import DapoLossStats

KIB_PER_MIB = 1024
SUMS = (
    "loss",
    "tokens",
    "clipped_high",
    "clipped_low",
    "dual_clipped",
    "impossible",
    "logratio_sum",
    "ratio_sum",
    "kl_sum",
)
"""The loss, and fields of DapoLossStats."""


class Stopwatch:
    """Seconds of the phases of a step, in order."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self.metrics: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """The time since the last lap belongs to `learner/<phase>_s`."""
        now = time.perf_counter()
        self.metrics[f"learner/{phase}_s"] = now - self._last
        self._last = now

    def finish(self) -> dict[str, float]:
        step_s = self._last - self._started
        idle = self.metrics.get("learner/wait_s", 0.0) / max(step_s, 1e-9)
        return {**self.metrics, "learner/step_s": step_s, "learner/idle_frac": idle}


@dataclass(slots=True)
class UpdateFigures:
    """Sums over this rank's micro-batches of one step."""

    device: torch.device
    sums: Tensor = field(init=False)
    """[len(SUMS)] float64."""
    first_ratio_max_diff: Tensor = field(init=False)
    updates: list[Update] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)
        self.first_ratio_max_diff = torch.zeros(1, dtype=torch.float64, device=self.device)

    def add(self, loss: Tensor, stats: DapoLossStats) -> None:
        """One micro-batch, before its update is appended to `updates`."""
        counts = [getattr(stats, name) for name in SUMS[1:]]
        self.sums += torch.stack([loss.detach(), *counts]).double()
        if not self.updates:
            diff = stats.ratio_max_diff.double().reshape(1)
            self.first_ratio_max_diff = torch.maximum(self.first_ratio_max_diff, diff)

    def metrics(self, here: Processes, *, has_reference: bool) -> dict[str, float]:
        """The `learner/*` figures of all ranks. Collective."""
        mine = self.sums if here.reports else torch.zeros_like(self.sums)
        total = dict(zip(SUMS, here.sum_over_ranks(mine).tolist(), strict=True))
        tokens = max(total["tokens"], 1.0)
        norms = [u.grad_norm for u in self.updates if not u.is_skipped]
        found = {
            "learner/loss": total["loss"] / len(self.updates),
            "learner/tokens": total["tokens"],
            "learner/clipped_high_frac": total["clipped_high"] / tokens,
            "learner/clipped_low_frac": total["clipped_low"] / tokens,
            "learner/dual_clipped_frac": total["dual_clipped"] / tokens,
            "learner/tokens_impossible": total["impossible"],
            "learner/old_kl": -total["logratio_sum"] / tokens,
            "learner/ratio_mean": total["ratio_sum"] / tokens,
            "learner/first_ratio_max_diff": here.max_over_ranks(self.first_ratio_max_diff).item(),
            "learner/grad_norm": float(np.mean(norms)) if norms else 0.0,
            "learner/skipped_updates": float(sum(u.is_skipped for u in self.updates)),
        }
        return found | ({"learner/kl": total["kl_sum"] / tokens} if has_reference else {})


def batch_metrics(summaries: Sequence[GroupSummary]) -> dict[str, float]:
    """The `train/*` figures of a train batch."""
    lengths = np.array([s.num_tokens for s in summaries])
    return {
        "train/accuracy": float(np.mean([s.is_correct for s in summaries])),
        "train/reward_mean": float(np.mean([s.rewards for s in summaries])),
        "train/response_tokens_mean": float(lengths.mean()),
        "train/response_tokens_max": float(lengths.max()),
        "train/truncated_frac": float(np.mean([s.is_truncated for s in summaries])),
        "train/groups": float(len(summaries)),
    }


def padding_frac(here: Processes, batch: TrainBatch) -> float:
    """Share of the places of all ranks' rows that hold no token. Collective."""
    padding = sum(m.tokens.num_padding_tokens for m in batch.micros())
    places = sum(len(m.tokens.token_ids) for m in batch.micros())
    mine = torch.tensor([padding, places], dtype=torch.float64) * float(here.reports)
    all_padding, all_places = here.sum_over_ranks(mine).tolist()
    return float(all_padding / max(all_places, 1.0))


def process_metrics(here: Processes) -> dict[str, float]:
    """Processor time of all ranks and memory of the largest, so far. Collective."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(usage.ru_utime + usage.ru_stime for usage in used)
    memory = torch.tensor([used[0].ru_maxrss / KIB_PER_MIB])
    return {
        "learner/cpu_s": here.sum_over_ranks(torch.tensor([cpu_s])).item(),
        "learner/peak_memory_mib": here.max_over_ranks(memory).item(),
    }
