"""Packed rows through the policy: log-probs with or without gradients, on any parallel layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from dapo_hpc.learner.attention import PackedSequences, describe
from dapo_hpc.learner.model import Policy

Stats = Any
Loss = Callable[[int, Tensor, Tensor], tuple[Tensor, Stats]]
"""(number of the row, log-probs [T], entropy [T]) -> this row's share of the loss, statistics."""


@dataclass(frozen=True, slots=True)
class Row:
    """One micro-batch on the device: sequences one after the other."""

    token_ids: Tensor
    """[1, T'] int64; T' is T and what filling it took."""
    targets: Tensor
    """[1, T'] int64: the token whose log-prob each place gives."""
    sequences: PackedSequences
    num_tokens: int
    """T: places that hold real tokens; the rest fills the row and is cut off."""

    @property
    def num_filler_tokens(self) -> int:
        return self.token_ids.shape[1] - self.num_tokens


def row(policy: Policy, token_ids: np.ndarray, targets: np.ndarray, lengths: np.ndarray) -> Row:
    """Move a packed micro-batch to the device.

    A filler sequence is added where Megatron needs one: for an empty micro-batch, and under
    sequence parallelism to make the row a multiple of the tensor-parallel size.

    Args:
        policy: whose device and layout the row is for.
        token_ids: [T] int64.
        targets: [T] int64.
        lengths: [B] tokens of each sequence; their sum is T.
    """
    count = len(token_ids)
    multiple = policy.processes.layout.tensor if policy.config.sequence_parallel else 1
    filler = -count % multiple or (0 if count else multiple)
    if filler:
        zeros = np.zeros(filler, np.int64)
        token_ids, targets = (np.concatenate([x, zeros]) for x in (token_ids, targets))
        lengths = np.append(lengths, filler)
    device = policy.processes.device
    return Row(
        token_ids=torch.from_numpy(token_ids).to(device)[None],
        targets=torch.from_numpy(targets).to(device)[None],
        sequences=describe(lengths, policy.rotary, device),
        num_tokens=count,
    )


def forward_backward(policy: Policy, rows: Sequence[Row], loss: Loss) -> list[Stats]:
    """Add the gradient of the summed loss of all rows to the policy's main gradients.

    Gradients are summed over rows and data-parallel ranks, and divided by nothing.

    Returns:
        What `loss` gave beside the loss for each row; empty where this rank is not the last stage.
    """

    def with_count(number: int, output: Tensor) -> tuple[Tensor, Tensor, Stats]:
        value, stats = loss(number, *_log_probs(rows[number], output))
        return value, torch.zeros((), dtype=torch.int, device=output.device), stats

    return _schedule(policy, rows, with_count, is_training=True)


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

    def pair(number: int, output: Tensor) -> tuple[Tensor, Tensor, Stats]:
        zero = torch.zeros((), device=output.device)
        return zero, zero.to(torch.int), _log_probs(rows[number], output)

    head = policy.head
    if temperature is None or head is None:
        return _schedule(policy, rows, pair, is_training=False)
    usual, head.temperature = head.temperature, temperature
    try:
        return _schedule(policy, rows, pair, is_training=False)
    finally:
        head.temperature = usual


def _log_probs(of: Row, output: Tensor) -> tuple[Tensor, Tensor]:
    """[1, T', 2] -> [T], [T]; the entropy never carries a gradient."""
    real = output[0, : of.num_tokens]
    return real[:, 0], real[:, 1].detach()


def _schedule(
    policy: Policy,
    rows: Sequence[Row],
    finish: Callable[[int, Tensor], tuple[Tensor, Tensor, Stats]],
    *,
    is_training: bool,
) -> list[Stats]:
    """Megatron's pipeline schedule over the rows; every stage sees every row."""

    def forward_step(numbers: Iterator[int], model: Any) -> tuple[Tensor, Any]:
        number = next(numbers)
        current = rows[number]
        if policy.head is not None:
            policy.head.token_ids = current.targets
        output = model(current.token_ids, None, None, packed_seq_params=current.sequences)
        return output, lambda value: finish(number, value)

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
