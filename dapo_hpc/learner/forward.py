"""Packed rows through the policy: log-probs or losses, on any parallel layout.

log_probs              scores, without gradients
forward_backward       gradients of any loss of the log-probs
forward_backward_dapo  gradients of DAPO's loss
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from dapo_hpc.learner.attention import PackedSequences, describe, describe_share
from dapo_hpc.learner.context import Share, shares
from dapo_hpc.learner.head import LossInputs, Score, Targets, Train
from dapo_hpc.learner.model import Policy
from dapo_kernels import DapoLossStats

Stats = Any
Loss = Callable[[int, Tensor, Tensor], tuple[Tensor, Stats]]
"""(number of the row, log-probs [T], entropy [T]) -> this row's share of the loss, statistics."""
Job = TypeVar("Job", Score, Train)


@dataclass(frozen=True, slots=True)
class Row:
    """One micro-batch on the device: sequences one after the other."""

    token_ids: Tensor
    """[1, T'] int64; T' is T and what filling it took."""
    targets: Targets
    """Of the T' places."""
    sequences: PackedSequences
    num_tokens: int
    """T: places that hold real tokens; the rest fills the row and is cut off. All of a part of a
    longer row, whose filler is told by its share."""


def row(
    policy: Policy,
    token_ids: np.ndarray,
    targets: np.ndarray,
    lengths: np.ndarray,
    is_wanted: np.ndarray | None = None,
) -> Row:
    """Move a packed micro-batch to the device; under context parallelism this rank's share of it.

    A filler sequence is added where Megatron needs one: for an empty micro-batch, and under
    sequence parallelism to make the row a multiple of the tensor-parallel size.

    Args:
        policy: whose device and layout the row is for.
        token_ids: [T] int64.
        targets: [T] int64; the token whose log-prob each place gives.
        lengths: [B] tokens of each sequence; their sum is T.
        is_wanted: [T] bool; the other places do not go through the output layer, and their
            log-prob and entropy are 0. None: all are wanted.
    """
    if policy.processes.layout.context > 1:
        return _part(policy, token_ids, targets, lengths, is_wanted)
    count, multiple = len(token_ids), policy.row_multiple
    filler = -count % multiple or (0 if count else multiple)
    if filler:
        zeros = np.zeros(filler, np.int64)
        token_ids, targets = (np.concatenate([x, zeros]) for x in (token_ids, targets))
        lengths = np.append(lengths, filler)
    device = policy.processes.device
    places = None if is_wanted is None else torch.from_numpy(np.flatnonzero(is_wanted)).to(device)
    return Row(
        token_ids=torch.from_numpy(token_ids).to(device)[None],
        targets=Targets(token_ids=torch.from_numpy(targets).to(device), places=places),
        sequences=describe(lengths, device),
        num_tokens=count,
    )


def shares_of(policy: Policy, lengths: np.ndarray) -> list[Share]:
    """Which context-parallel rank holds what of a packed row."""
    return shares(lengths, policy.processes.layout.context, policy.row_multiple)


def _part(
    policy: Policy,
    token_ids: np.ndarray,
    targets: np.ndarray,
    lengths: np.ndarray,
    is_wanted: np.ndarray | None,
) -> Row:
    here = policy.processes
    every = shares_of(policy, lengths)
    mine = every[here.context_rank]
    wanted = np.ones(len(token_ids), bool) if is_wanted is None else is_wanted
    places = torch.from_numpy(np.flatnonzero(mine.take(wanted))).to(here.device)
    group = here.context_group
    return Row(
        token_ids=torch.from_numpy(mine.take(token_ids)).to(here.device)[None],
        targets=Targets(
            token_ids=torch.from_numpy(mine.take(targets)).to(here.device), places=places
        ),
        sequences=describe_share(lengths, every, here.context_rank, group, here.device),
        num_tokens=mine.size,
    )


def forward_backward(policy: Policy, rows: Sequence[Row], loss: Loss) -> list[Stats]:
    """Add the gradient of the summed loss of all rows to the policy's main gradients.

    Gradients are summed over rows and data-parallel ranks, and divided by nothing.

    Returns:
        What `loss` gave beside the loss for each row; empty where this rank is not the last stage.
    """

    def finish(number: int, _job: Score, output: Tensor) -> tuple[Tensor, Stats]:
        return loss(number, *_log_probs(rows[number], output))

    return _schedule(policy, rows, lambda number: Score(rows[number].targets), finish)


def forward_backward_dapo(
    policy: Policy, rows: Sequence[Row], inputs: Callable[[int], LossInputs]
) -> list[tuple[Tensor, DapoLossStats]]:
    """`forward_backward` of DAPO's loss; the head forms the gradients in its forward pass.

    Args:
        policy: the model.
        rows: packed micro-batches, without filler unless they are empty.
        inputs: of the row of that number; asked for on the last stage only.

    Returns:
        Each row's share of the loss and its statistics; empty where this rank is not the last
        stage.
    """

    def job(number: int) -> Train:
        return Train(rows[number].targets, inputs(number))

    def finish(_number: int, job: Train, output: Tensor) -> tuple[Tensor, Stats]:
        loss = output.sum()  # of one number; not a view, because Megatron frees it
        return loss, (loss.detach(), job.stats)

    return _schedule(policy, rows, job, finish)


@torch.no_grad()
def log_probs(
    policy: Policy, rows: Sequence[Row], *, temperature: float | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Log-probs [T] and entropy [T], float32, of each row, without gradients.

    Args:
        policy: the model.
        rows: packed micro-batches.
        temperature: instead of the policy's own.

    Returns:
        One pair for each row; empty where this rank is not the last stage.
    """

    def job(number: int) -> Score:
        return Score(rows[number].targets, temperature)

    def finish(number: int, _job: Score, output: Tensor) -> tuple[Tensor, Stats]:
        return torch.zeros((), device=output.device), _log_probs(rows[number], output)

    return _schedule(policy, rows, job, finish, is_training=False)


def _log_probs(of: Row, output: Tensor) -> tuple[Tensor, Tensor]:
    """[1, T', 2] -> [T], [T]; the entropy never carries a gradient."""
    real = output[0, : of.num_tokens]
    return real[:, 0], real[:, 1].detach()


def _schedule(
    policy: Policy,
    rows: Sequence[Row],
    job: Callable[[int], Job],
    finish: Callable[[int, Job, Tensor], tuple[Tensor, Stats]],
    *,
    is_training: bool = True,
) -> list[Stats]:
    """Megatron's pipeline schedule over the rows; every stage sees every row.

    Args:
        policy: the model.
        rows: packed micro-batches.
        job: what the head of the last stage does with the row of that number.
        finish: makes loss and statistics of a row's number, its job and the head's output. The
            loss is added up and scaled by nothing.
        is_training: with backward passes.
    """

    def forward_step(numbers: Iterator[int], model: Any) -> tuple[Tensor, Any]:
        number = next(numbers)
        current = rows[number]
        head, todo = policy.head, None
        if head is not None:
            head.job = todo = job(number)
        sequences = current.sequences.with_angles(policy.rotary)
        output = model(current.token_ids, None, None, packed_seq_params=sequences)

        def loss_of(output: Tensor) -> tuple[Tensor, Tensor, Stats]:
            assert todo is not None, "Megatron asks for the loss on the last stage only"
            no_count = torch.zeros((), dtype=torch.int, device=output.device)
            loss, stats = finish(number, todo, output)
            return loss, no_count, stats

        return output, loss_of

    results: list[Stats] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(range(len(rows))),
        model=policy.ddp,
        num_microbatches=len(rows),
        seq_length=1,  # unused: stages tell each other shapes
        micro_batch_size=1,
        forward_only=not is_training,
    )
    return results
