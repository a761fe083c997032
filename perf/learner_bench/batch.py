"""The sequences of a benchmark: the same for every team, drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dapo_hpc.records import Group, GroupSummary, PolicyVersion, Prompt, Response, VersionSpan

from .shapes import Load

FIRST_TOKEN = 3
"""Below it are the special ones."""
START = PolicyVersion(step=0, lineage=1)


def draw(load: Load, vocab: int, seed: int) -> list[Group]:
    """Groups of responses with ragged lengths; about half of each group is right."""
    rng = np.random.default_rng(seed)
    return [_group(number, load, vocab, rng) for number in range(load.prompts)]


def _group(number: int, load: Load, vocab: int, rng: np.random.Generator) -> Group:
    prompt_tokens = int(rng.integers(load.max_prompt_tokens // 2, load.max_prompt_tokens + 1))
    prompt = Prompt(
        uid=str(number),
        row=number,
        token_ids=_tokens(prompt_tokens, vocab, rng),
        data_source="drawn",
        ground_truth="",
    )
    lengths = rng.lognormal(math.log(load.median_response_tokens), load.spread, load.group_size)
    responses = tuple(
        _response(index, min(max(round(length), 1), load.max_response_tokens), vocab, rng)
        for index, length in enumerate(lengths)
    )
    return Group(group_id=number, prompt=prompt, responses=responses)


def _response(index: int, length: int, vocab: int, rng: np.random.Generator) -> Response:
    is_correct = index % 2 == 0
    return Response(
        index=index,
        token_ids=_tokens(length, vocab, rng),
        rollout_logprobs=rng.normal(-math.log(vocab), 0.3, length).astype(np.float32),
        spans=(VersionSpan(start=0, version=START),),
        finish_reason="stop",
        is_correct=is_correct,
        reward=1.0 if is_correct else -1.0,
    )


def _tokens(count: int, vocab: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(FIRST_TOKEN, vocab, count).astype(np.int32)


def summaries(groups: Sequence[Group]) -> list[GroupSummary]:
    """As the buffer hands them to the learner."""
    return [
        GroupSummary(
            group_id=group.group_id,
            prompt_row=group.prompt.row,
            num_prompt_tokens=len(group.prompt.token_ids),
            num_tokens=tuple(len(response.token_ids) for response in group.responses),
            rewards=tuple(response.reward for response in group.responses),
            is_correct=tuple(response.is_correct for response in group.responses),
            is_truncated=(False,) * len(group.responses),
            min_step=START.step,
            max_step=START.step,
        )
        for group in groups
    ]


def sequences(groups: Sequence[Group]) -> list[tuple[int, int]]:
    """(prompt tokens, response tokens) of every response: what a batch is counted by.

    Every response is one sequence with a prompt of its own, whoever computes it, and padding is no
    token.
    """
    return [
        (len(group.prompt.token_ids), len(response.token_ids))
        for group in groups
        for response in group.responses
    ]
