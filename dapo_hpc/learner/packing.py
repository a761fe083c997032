"""From a train batch to micro-batches: who computes what, with which weight, laid out how.

plan_step      groups -> mini-batches -> ranks -> micro-batches; the same on every rank
token_weights  the denominator of the loss, written out
pack, unpack   responses <-> one row of tokens
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dapo_hpc.learner.context import Share
from dapo_hpc.records import Group, GroupSummary, Response

Normalization = Literal["global_tokens", "per_prompt", "per_sequence", "per_sequence_const"]

Member = tuple[int, int]
"""(position of the group in the train batch, index of the response in the group)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatchPlan:
    """One optimizer step."""

    groups: tuple[int, ...]
    """Positions of its groups, which are whole, in the train batch."""
    ranks: tuple[tuple[tuple[Member, ...], ...], ...]
    """ranks[d] is the list of micro-batches of data-parallel rank d; as long on every rank, filled
    up with ()."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """All micro-batches of one rollout step, used by scoring and training alike."""

    mini_batches: tuple[MiniBatchPlan, ...]

    def positions(self, rank: int) -> list[int]:
        """Positions of the groups of which a data-parallel rank needs any response, ascending."""
        micro_batches = (micro for mini in self.mini_batches for micro in mini.ranks[rank])
        return sorted({position for micro in micro_batches for position, _ in micro})


def plan_step(
    groups: Sequence[GroupSummary],
    *,
    mini_batches: int,
    micro_batch_tokens: int,
    data_parallel: int,
    seed: int,
) -> StepPlan:
    """Deal a train batch out to optimizer steps, ranks and micro-batches.

    Groups are shuffled by seed and dealt whole, evenly by number, to the mini-batches (at most one
    for each group). Inside one, responses go longest first to the rank with the fewest tokens, and
    neighbours in length share a micro-batch. Depends on the arguments only.

    Args:
        groups: the train batch, in the order the buffer gave it.
        mini_batches: optimizer steps wanted.
        micro_batch_tokens: bound on prompt + response tokens of a micro-batch; a longer response
            is one alone.
        data_parallel: number of ranks.
        seed: of the shuffle.

    Raises:
        ValueError: the batch is empty, or a count is not positive.
    """
    if not groups or min(mini_batches, micro_batch_tokens, data_parallel) < 1:
        raise ValueError(
            f"plan_step: {len(groups)} groups, mini_batches = {mini_batches}, micro_batch_tokens = "
            f"{micro_batch_tokens}, data_parallel = {data_parallel}; all must be positive."
        )
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    count = min(mini_batches, len(groups))
    bounds = [len(groups) * index // count for index in range(count + 1)]
    return StepPlan(
        mini_batches=tuple(
            _plan_mini_batch(groups, order[start:end], micro_batch_tokens, data_parallel)
            for start, end in zip(bounds, bounds[1:], strict=False)
        )
    )


def trained_tokens(
    groups: Sequence[GroupSummary], *, overlong_filtering: bool, dropped: np.ndarray | None = None
) -> np.ndarray:
    """Tokens of each response that train; what every denominator counts.

    Args:
        groups: the train batch.
        overlong_filtering: truncated responses train nothing and count nowhere.
        dropped: [N, G] tokens without a finite rollout log-prob, summed over the data-parallel
            ranks (see correction.non_finite_tokens); the only number one rank does not know.

    Returns:
        [N, G] int64.
    """
    counts = np.array([group.num_tokens for group in groups], dtype=np.int64)
    if dropped is not None:
        counts = counts - dropped
    if overlong_filtering:
        counts[np.array([group.is_truncated for group in groups], dtype=bool)] = 0
    return counts


def token_weights(
    num_trained: np.ndarray, normalization: Normalization, *, max_response_tokens: int
) -> np.ndarray:
    """Weight w_gi of every trained token of response i of group g in one mini-batch.

    The loss of the mini-batch is sum_g sum_i w_gi sum_t l_git over all ranks. With n_gi trained
    tokens, n_g = sum_i n_gi, n = sum_g n_g, and S responses and P groups with any trained token:

        global_tokens       1 / n           mean over all trained tokens
        per_prompt          1 / (P n_g)     mean over groups of their token means; DAPO, Eq. 8
        per_sequence        1 / (S n_gi)    mean over responses of their token means; GRPO
        per_sequence_const  1 / (S L)       L = max_response_tokens; Dr. GRPO, arXiv 2503.20783

    A response or group without trained tokens has weight 0 and is not in S or P.

    Args:
        num_trained: [N, G] int, the rows of `trained_tokens` of the whole mini-batch, the
            responses of other ranks included.
        normalization: one of the above.
        max_response_tokens: L.

    Returns:
        [N, G] float64.
    """
    counts = np.asarray(num_trained, dtype=np.float64)
    num_responses = np.count_nonzero(counts)
    if normalization == "global_tokens":
        denominator = np.full_like(counts, counts.sum())
    elif normalization == "per_prompt":
        of_group = counts.sum(axis=1, keepdims=True)
        denominator = np.broadcast_to(np.count_nonzero(of_group) * of_group, counts.shape)
    elif normalization == "per_sequence":
        denominator = num_responses * counts
    else:
        denominator = np.full_like(counts, num_responses * max_response_tokens)
    return np.divide(1.0, denominator, out=np.zeros_like(counts), where=counts > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The tokens of one forward pass in one row, sequence after sequence, padding last.

    Position t predicts token t + 1 of its sequence; every per-token tensor but token_ids and
    positions belongs to that predicted token, and is 0 where it is not a trained one.
    """

    members: tuple[Member, ...]
    token_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64, from 0 in each sequence."""
    cu_seqlens: Tensor
    """[S + 1] int32; sequence s is [cu_seqlens[s], cu_seqlens[s + 1]). The padding, if any, is
    the last sequence."""
    targets: Tensor
    """[T] int64; 0 at the last position of a sequence."""
    loss_mask: Tensor
    """[T] bool; the predicted token trains."""
    advantages: Tensor
    """[T] float32."""
    token_weights: Tensor
    """[T] float32."""
    rollout_logprobs: Tensor
    """[T] float32, nats; finite."""
    sampling_steps: Tensor
    """[T] int64; step of the policy version that sampled the predicted token, -1 without one."""
    response_bounds: tuple[tuple[int, int], ...]
    """For each member, the positions [start, end) that predict its response's tokens."""
    max_sequence_tokens: int
    num_padding_tokens: int

    @property
    def lengths(self) -> np.ndarray:
        """[S] int64: tokens of each sequence, that of the padding included."""
        return np.diff(self.cu_seqlens.numpy()).astype(np.int64)

    def share(self, share: Share) -> MicroBatch:
        """A context-parallel rank's part: every per-token tensor [T'] instead of [T].

        What is said of whole sequences (cu_seqlens, response_bounds) stays that of the whole row.
        """
        first_padding = len(self.token_ids) - self.num_padding_tokens
        real = int((share.places < first_padding).sum())
        tensors = {name: share.take_tensor(getattr(self, name)) for name in PER_TOKEN}
        return replace(self, **tensors, num_padding_tokens=share.size - real)  # type: ignore[arg-type]  # all of them tensors

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same with its tensors on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


PER_TOKEN = (
    "token_ids",
    "positions",
    "targets",
    "loss_mask",
    "advantages",
    "token_weights",
    "rollout_logprobs",
    "sampling_steps",
)
"""Fields of MicroBatch with an entry for each token."""


def pack(
    members: Sequence[Member],
    groups: Mapping[int, Group],
    *,
    advantages: np.ndarray,
    weights: np.ndarray,
    multiple: int = 1,
) -> MicroBatch:
    """Lay the prompts and responses of a micro-batch out in one row.

    A token trains if its response has a weight and its rollout log-prob is finite. An empty
    micro-batch becomes `multiple` tokens of padding, so that every rank runs the same passes.

    Args:
        members: one entry of MiniBatchPlan.ranks[d].
        groups: by position in the train batch, at least those named by members.
        advantages: [N, G] of the train batch.
        weights: [N, G] of the train batch; see token_weights.
        multiple: T is filled up to a multiple of it (sequence parallelism: the tensor-parallel
            size).
    """
    lengths = [_sequence_tokens(groups[p], groups[p].responses[i]) for p, i in members]
    used = sum(lengths)
    padding = max(-used % multiple, multiple if used == 0 else 0)
    lengths += [padding] if padding else []
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    row = _Row(used + padding)
    bounds: list[tuple[int, int]] = []
    for (position, index), start in zip(members, cu_seqlens.tolist(), strict=False):
        group = groups[position]
        bounds.append(
            row.write(
                start,
                group.prompt.token_ids,
                group.responses[index],
                float(advantages[position, index]),
                float(weights[position, index]),
            )
        )
    return MicroBatch(
        members=tuple(members),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        response_bounds=tuple(bounds),
        max_sequence_tokens=max(lengths),
        num_padding_tokens=padding,
        token_ids=torch.from_numpy(row.token_ids),
        targets=torch.from_numpy(row.targets),
        loss_mask=torch.from_numpy(row.loss_mask),
        advantages=torch.from_numpy(row.advantages),
        token_weights=torch.from_numpy(row.token_weights),
        rollout_logprobs=torch.from_numpy(row.rollout_logprobs),
        sampling_steps=torch.from_numpy(row.sampling_steps),
    )


def unpack(values: Tensor, micro_batch: MicroBatch) -> list[Tensor]:
    """Per-token values [T, ...] cut into one [n, ...] for each member: its response's tokens."""
    return [values[start:end] for start, end in micro_batch.response_bounds]


class _Row:
    """The arrays of a MicroBatch while they are filled."""

    def __init__(self, num_tokens: int) -> None:
        self.token_ids = np.zeros(num_tokens, dtype=np.int64)
        self.targets = np.zeros(num_tokens, dtype=np.int64)
        self.loss_mask = np.zeros(num_tokens, dtype=bool)
        self.advantages = np.zeros(num_tokens, dtype=np.float32)
        self.token_weights = np.zeros(num_tokens, dtype=np.float32)
        self.rollout_logprobs = np.zeros(num_tokens, dtype=np.float32)
        self.sampling_steps = np.full(num_tokens, -1, dtype=np.int64)

    def write(
        self, start: int, prompt: np.ndarray, response: Response, advantage: float, weight: float
    ) -> tuple[int, int]:
        tokens = np.concatenate((prompt, response.token_ids))
        end = start + len(tokens)
        self.token_ids[start:end] = tokens
        self.targets[start : end - 1] = tokens[1:]
        answer = slice(start + len(prompt) - 1, end - 1)
        is_finite = np.isfinite(response.rollout_logprobs)
        is_trained = is_finite & (weight > 0)
        self.loss_mask[answer] = is_trained
        self.advantages[answer] = np.where(is_trained, advantage, 0.0)
        self.token_weights[answer] = np.where(is_trained, weight, 0.0)
        self.rollout_logprobs[answer] = np.where(is_finite, response.rollout_logprobs, 0.0)
        for span in response.spans:
            self.sampling_steps[answer.start + span.start : answer.stop] = span.version.step
        return answer.start, answer.stop


def _plan_mini_batch(
    groups: Sequence[GroupSummary], positions: list[int], micro_batch_tokens: int, num_ranks: int
) -> MiniBatchPlan:
    tokens: dict[Member, int] = {
        (position, index): groups[position].num_prompt_tokens + num_tokens
        for position in positions
        for index, num_tokens in enumerate(groups[position].num_tokens)
    }
    longest_first = sorted(tokens, key=lambda member: (-tokens[member], member))
    by_rank = _deal(longest_first, tokens, num_ranks)
    micro_batches = [_fill(members, tokens, micro_batch_tokens) for members in by_rank]
    most = max(map(len, micro_batches))
    ranks = tuple(tuple(filled + [()] * (most - len(filled))) for filled in micro_batches)
    return MiniBatchPlan(groups=tuple(positions), ranks=ranks)


def _deal(members: list[Member], tokens: dict[Member, int], num_ranks: int) -> list[list[Member]]:
    """Each member to the rank with the fewest tokens so far."""
    hands: list[list[Member]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for member in members:
        load, rank = heapq.heappop(loads)
        hands[rank].append(member)
        heapq.heappush(loads, (load + tokens[member], rank))
    return hands


def _fill(
    members: list[Member], tokens: dict[Member, int], budget: int
) -> list[tuple[Member, ...]]:
    """Consecutive members together while they fit the budget."""
    filled: list[list[Member]] = []
    room = 0
    for member in members:
        if not filled or tokens[member] > room:
            filled.append([])
            room = budget
        filled[-1].append(member)
        room -= tokens[member]
    return [tuple(micro_batch) for micro_batch in filled]


def _sequence_tokens(group: Group, response: Response) -> int:
    return len(group.prompt.token_ids) + len(response.token_ids)
