"""Random train batches for the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dapo_hpc.records import Group, GroupSummary, PolicyVersion, Prompt, Response, VersionSpan

VOCAB = 13
MAX_RESPONSE_TOKENS = 9
SPANS = (VersionSpan(start=0, version=PolicyVersion(step=0, lineage=0)),)


@dataclass(frozen=True)
class Batch:
    summaries: list[GroupSummary]
    groups: dict[int, Group]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.summaries), len(self.summaries[0].num_tokens)


def random_batch(
    num_groups: int, group_size: int, seed: int, *, non_finite_frac: float = 0.0
) -> Batch:
    """Prompts of 1 to 5 tokens, responses of 1 to MAX_RESPONSE_TOKENS."""
    generator = np.random.default_rng(seed)
    groups = {
        position: Group(
            group_id=100 + position,
            prompt=Prompt(
                uid=str(position),
                row=position,
                token_ids=generator.integers(0, VOCAB, generator.integers(1, 6), np.int32),
                data_source="test",
                ground_truth="",
            ),
            responses=tuple(
                _response(generator, index, non_finite_frac) for index in range(group_size)
            ),
        )
        for position in range(num_groups)
    }
    return Batch([_summary(group) for group in groups.values()], groups)


def _response(generator: np.random.Generator, index: int, non_finite_frac: float) -> Response:
    num_tokens = int(generator.integers(1, MAX_RESPONSE_TOKENS + 1))
    logprobs = -generator.exponential(1.0, num_tokens).astype(np.float32)
    logprobs[generator.random(num_tokens) < non_finite_frac] = generator.choice(
        np.array([np.nan, -np.inf, np.inf], dtype=np.float32)
    )
    return Response(
        index=index,
        token_ids=generator.integers(0, VOCAB, num_tokens, np.int32),
        rollout_logprobs=logprobs,
        spans=SPANS,
        finish_reason="length" if num_tokens == MAX_RESPONSE_TOKENS else "stop",
        is_correct=bool(generator.integers(2)),
        reward=float(generator.choice([-1.5, -1.0, 0.5, 1.0])),
    )


def _summary(group: Group) -> GroupSummary:
    responses = group.responses
    return GroupSummary(
        group_id=group.group_id,
        prompt_row=group.prompt.row,
        num_prompt_tokens=len(group.prompt.token_ids),
        num_tokens=tuple(len(response.token_ids) for response in responses),
        rewards=tuple(response.reward for response in responses),
        is_correct=tuple(response.is_correct for response in responses),
        is_truncated=tuple(response.finish_reason == "length" for response in responses),
        min_step=0,
        max_step=0,
    )
