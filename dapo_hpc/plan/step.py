"""What one rollout step is made of: responses, tokens, updates, micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from dapo_hpc.config import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """Of one rollout step. Tokens are prompt and response; dynamic sampling samples more."""

    responses: int
    responses_per_update: int
    """Of the largest mini-batch."""
    updates: int
    max_tokens: int
    """Every prompt and every response at its limit."""
    half_tokens: int
    """Prompts at their limit, responses half as long."""
    max_rank_tokens: int
    """On the data-parallel rank with most, at the limit."""
    max_micro_batches: int
    """Of one update on one data-parallel rank, at the limit."""
    half_micro_batches: int


def count_step(config: RunConfig) -> StepCounts:
    rollout, learner = config.rollout, config.learner
    responses = rollout.prompts_per_step * rollout.group_size
    # Groups stay whole and are dealt evenly by number.
    per_update = -(-rollout.prompts_per_step // learner.mini_batches) * rollout.group_size
    on_rank = -(-per_update // learner.data_parallel)
    longest = config.max_sequence_tokens
    half = config.prompts.max_tokens + -(-rollout.max_response_tokens // 2)
    return StepCounts(
        responses=responses,
        responses_per_update=per_update,
        updates=learner.mini_batches,
        max_tokens=responses * longest,
        half_tokens=responses * half,
        max_rank_tokens=on_rank * learner.mini_batches * longest,
        max_micro_batches=_micro_batches(on_rank, longest, learner.micro_batch_tokens),
        half_micro_batches=_micro_batches(on_rank, half, learner.micro_batch_tokens),
    )


def sft_phase(config: RunConfig) -> RunConfig:
    """A config whose rollout step is one optimizer step of `dapo sft`; it needs an [sft] section.

    As many sequences as a batch has pairs. How long these are is known when they are tokenized:
    here each has learner.micro_batch_tokens, the most that one forward pass takes of shorter ones.
    """
    assert config.sft is not None, "only a config with an [sft] section has such a phase"
    changes: dict[str, dict[str, object]] = {
        "model": {"path": config.sft.init},
        "prompts": {"max_tokens": 0},
        "rollout": {
            "prompts_per_step": config.sft.batch_size,
            "group_size": 1,
            "max_response_tokens": config.learner.micro_batch_tokens,
        },
        "learner": {"mini_batches": 1},
        "loss": {"kl_coef": 0.0},
    }
    sections = {
        name: getattr(config, name).model_copy(update=values) for name, values in changes.items()
    }
    return config.model_copy(update=sections)


def _micro_batches(sequences: int, tokens: int, budget: int) -> int:
    """Sequences of one length together while they fit the budget, at least one."""
    return -(-sequences // max(1, budget // tokens))
