"""A train batch on this rank: fetched, weighted and packed as the step's plan says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dapo_hpc.buffer.messages import decode, encode
from dapo_hpc.config import LossSection, RunConfig
from dapo_hpc.learner.advantage import group_advantages
from dapo_hpc.learner.correction import non_finite_tokens
from dapo_hpc.learner.forward import Row, row, shares_of
from dapo_hpc.learner.head import LossInputs
from dapo_hpc.learner.model import Policy
from dapo_hpc.learner.packing import (
    MicroBatch,
    StepPlan,
    pack,
    token_weights,
    trained_tokens,
)
from dapo_hpc.learner.parallel import Processes
from dapo_hpc.records import Group, GroupSummary

Fetch = Callable[[list[int]], list[Group]]


@dataclass(slots=True)
class Micro:
    """One micro-batch; the log-probs are filled in by scoring, on the last stage."""

    tokens: MicroBatch
    row: Row
    old_logprobs: Tensor | None = None
    """[T] float32, nats; the policy's before the step's first update. 0 where nothing trains."""
    ref_logprobs: Tensor | None = None
    """The same of the reference policy; None when loss.kl_coef is 0."""

    def loss_inputs(self, rule: LossSection) -> LossInputs:
        """Once it is scored; on the last stage."""
        assert self.old_logprobs is not None, "scoring fills old_logprobs on the last stage"
        is_corrected = rule.importance_sampling == "token"
        return LossInputs(
            old_logprobs=self.old_logprobs,
            rollout_logprobs=self.tokens.rollout_logprobs if is_corrected else None,
            ref_logprobs=self.ref_logprobs,
            advantages=self.tokens.advantages,
            token_weights=self.tokens.token_weights,
            rule=rule,
        )


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """This rank's share of one rollout step."""

    mini_batches: list[list[Micro]]
    """One list of micro-batches for each optimizer step; as many on every rank."""
    num_dropped_tokens: int
    """Over all ranks: tokens without a finite rollout log-prob."""

    def micros(self) -> list[Micro]:
        """All micro-batches in order: what scoring runs through in one go."""
        return [micro for mini_batch in self.mini_batches for micro in mini_batch]


def fetch_groups(
    processes: Processes, fetch: Fetch, plan: StepPlan, summaries: Sequence[GroupSummary]
) -> dict[int, Group]:
    """The groups of which this rank trains a response, by position in the train batch.

    One rank of each data-parallel replica asks the buffer; it gives them to the others.
    """
    positions = plan.positions(processes.data_rank)
    ids = [summaries[position].group_id for position in positions]
    if processes.layout.tensor * processes.layout.pipeline == 1:
        groups = fetch(ids)
    else:
        groups = decode(processes.share_in_replica(lambda: encode(fetch(ids))), list[Group])
    by_id = {group.group_id: group for group in groups}
    return {position: by_id[id_] for position, id_ in zip(positions, ids, strict=True)}


def build(
    policy: Policy,
    config: RunConfig,
    plan: StepPlan,
    summaries: Sequence[GroupSummary],
    groups: dict[int, Group],
) -> TrainBatch:
    """Advantages, token weights and packed rows of this rank's micro-batches."""
    here = policy.processes
    dropped = _dropped(here, plan, groups, (len(summaries), len(summaries[0].rewards)))
    advantages = np.stack(
        [group_advantages(np.array(s.rewards), config.advantage) for s in summaries]
    )
    weights = _weights(config, plan, summaries, dropped)
    is_shared = here.layout.context > 1
    multiple = 1 if is_shared else policy.row_multiple

    def micro(members: Sequence[tuple[int, int]]) -> Micro:
        tokens = pack(members, groups, advantages=advantages, weights=weights, multiple=multiple)
        row = _row(policy, tokens)
        if is_shared:
            tokens = tokens.share(shares_of(policy, tokens.lengths)[here.context_rank])
        return Micro(tokens.to(here.device), row)

    mini_batches = [
        [micro(members) for members in mini.ranks[here.data_rank]] for mini in plan.mini_batches
    ]
    return TrainBatch(mini_batches, int(dropped.sum()))


def _row(policy: Policy, tokens: MicroBatch) -> Row:
    return row(
        policy,
        tokens.token_ids.numpy(),
        tokens.targets.numpy(),
        tokens.lengths,
        is_wanted=tokens.loss_mask.numpy(),
    )


def _dropped(
    here: Processes, plan: StepPlan, groups: dict[int, Group], shape: tuple[int, int]
) -> np.ndarray:
    """[N, G] tokens without a finite rollout log-prob, over all ranks."""
    mine = np.zeros(shape, dtype=np.int64)
    if here.speaks:
        members = [
            member
            for mini in plan.mini_batches
            for micro in mini.ranks[here.data_rank]
            for member in micro
        ]
        mine = non_finite_tokens(members, groups, shape)
    return here.sum_over_ranks(torch.from_numpy(mine)).to(torch.int64).numpy()


def _weights(
    config: RunConfig, plan: StepPlan, summaries: Sequence[GroupSummary], dropped: np.ndarray
) -> np.ndarray:
    """[N, G] float64: each mini-batch has a denominator of its own."""
    num_trained = trained_tokens(
        summaries, overlong_filtering=config.loss.overlong_filtering, dropped=dropped
    )
    weights = np.zeros(num_trained.shape)
    for mini in plan.mini_batches:
        rows = list(mini.groups)
        weights[rows] = token_weights(
            num_trained[rows],
            config.loss.normalization,
            max_response_tokens=config.rollout.max_response_tokens,
        )
    return weights
