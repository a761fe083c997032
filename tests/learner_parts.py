"""Tiny models of every family, a config and a stand-in for the buffer, for tests of the learner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from dapo_hpc.buffer.messages import EvaluationsReply, TakeReply
from dapo_hpc.config import RunConfig, parse
from dapo_hpc.records import (
    EvalResult,
    Group,
    GroupSummary,
    PolicyVersion,
    Prompt,
    Response,
    VersionSpan,
)

FAMILIES: dict[str, tuple[Any, Any]] = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
}
VOCAB = 33
"""Odd, so that two tensor-parallel ranks need a padded row."""


def make_model(directory: Path, family: str = "qwen2", *, tied: bool = False) -> Any:
    """Write a model of two layers with wide random weights; returns it (float32, eager)."""
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16 if family == "qwen3" else None,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        eos_token_id=1,
        pad_token_id=2,
        bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        attn_implementation="eager",
    )
    if family != "qwen3":
        config.head_dim = config.hidden_size // config.num_attention_heads
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.15 * noise)
    model.save_pretrained(directory)
    return model


def make_config(model: Path, root: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run of 3 steps of 4 prompts x 4 responses; `sections` override its keys."""
    table: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "dir": str(root), "total_steps": 3},
        "model": {"path": str(model), "dtype": "float32"},
        "prompts": {"train": "unused.parquet", "max_tokens": 8},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_response_tokens": 16},
        "reward": {"overlong_punishment": False},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "loss": {"mismatch_warn": 50.0, "mismatch_stop": 100.0},
        "learner": {"mini_batches": 2, "micro_batch_tokens": 64, "checkpoint_every": 1},
        "eval": {"every": 0},
    }
    for section, values in sections.items():
        table[section] = {**table.get(section, {}), **values}
    return parse(table)


def make_group(
    group_id: int, rng: np.random.Generator, size: int = 4, policy_step: int = 0
) -> Group:
    """Random ordinary tokens (transformers trains no padding token); half the responses right."""
    version = PolicyVersion(step=policy_step, lineage=1)
    prompt = Prompt(
        uid=str(group_id),
        row=group_id,
        token_ids=rng.integers(3, VOCAB, int(rng.integers(2, 8))).astype(np.int32),
        data_source="test",
        ground_truth="1",
    )
    lengths = rng.integers(1, 16, size)
    responses = tuple(
        Response(
            index=index,
            token_ids=rng.integers(3, VOCAB, int(length)).astype(np.int32),
            rollout_logprobs=rng.normal(-3.5, 0.3, int(length)).astype(np.float32),
            spans=(VersionSpan(start=0, version=version),),
            finish_reason="stop",
            is_correct=index < size // 2,
            reward=1.0 if index < size // 2 else -1.0,
        )
        for index, length in enumerate(lengths)
    )
    return Group(group_id=group_id, prompt=prompt, responses=responses)


def summarize(group: Group, step: int = 0) -> GroupSummary:
    return GroupSummary(
        group_id=group.group_id,
        prompt_row=group.prompt.row,
        num_prompt_tokens=len(group.prompt.token_ids),
        num_tokens=tuple(len(r.token_ids) for r in group.responses),
        rewards=tuple(r.reward for r in group.responses),
        is_correct=tuple(r.is_correct for r in group.responses),
        is_truncated=tuple(r.finish_reason == "length" for r in group.responses),
        min_step=step,
        max_step=step,
    )


class FakeBuffer:
    """Hands out the same random batch whenever the same step is asked for; evaluates at once."""

    def __init__(self, prompts_per_step: int = 4, staleness: int = 0) -> None:
        self.prompts_per_step = prompts_per_step
        self.staleness = staleness
        self.lineage = 0
        self.published: list[tuple[PolicyVersion, bool]] = []
        self.commits: list[int] = []
        self.is_finished = False
        self._groups: dict[int, Group] = {}

    def batch(self, step: int) -> list[Group]:
        rng = np.random.default_rng(step)
        ids = range(step * 100, step * 100 + self.prompts_per_step)
        policy_step = step - 1 - self.staleness
        return [make_group(id_, rng, policy_step=policy_step) for id_ in ids]

    def register(self, step: int) -> int:
        del step
        self.lineage += 1
        return self.lineage

    def take(self, lineage: int, step: int, wait_s: float) -> TakeReply:
        del wait_s
        assert lineage == self.lineage
        groups = self.batch(step)
        return TakeReply(groups=[summarize(g, step - 1) for g in groups], metrics={})

    def fetch(self, group_ids: list[int]) -> list[Group]:
        steps = sorted({id_ // 100 for id_ in group_ids})
        known = {group.group_id: group for step in steps for group in self.batch(step)}
        return [known[id_] for id_ in group_ids]

    def publish(self, version: PolicyVersion, *, is_evaluated: bool) -> None:
        self.published.append((version, is_evaluated))

    def commit(self, lineage: int, step: int) -> None:
        assert lineage == self.lineage
        self.commits.append(step)

    def evaluations(self) -> EvaluationsReply:
        results = [
            EvalResult(
                version=version,
                num_prompts=2,
                num_samples=2,
                accuracy=0.5,
                pass_at_k=1.0,
                mean_tokens=3.0,
                accuracy_by_source={"test": 0.5},
            )
            for version, is_evaluated in self.published
            if is_evaluated
        ]
        return EvaluationsReply(results=results, num_pending=0, versions_in_use=[])

    def finish(self, lineage: int) -> None:
        assert lineage == self.lineage
        self.is_finished = True
