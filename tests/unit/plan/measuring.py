"""The truth that plans are held against: bytes of real tensors in real passes, on CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from megatron.core import parallel_state as mpu
from torch.profiler import ProfilerActivity, profile

from dapo_hpc.config import RunConfig, parse
from dapo_hpc.learner import forward
from dapo_hpc.learner.forward import Row
from dapo_hpc.learner.head import LossInputs, Train
from dapo_hpc.learner.model import Policy
from dapo_hpc.learner.optimizer import AdamSettings, Optimizer
from dapo_hpc.learner.parallel import Processes
from dapo_hpc.plan.architecture import Architecture
from dapo_hpc.weights.source import RandomSource

FAMILIES = {
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "llama": transformers.LlamaConfig,
}
TOKENS = 2400
"""Of a micro-batch: two sequences of the same length, so that attention pads nothing; two chunks of
the head."""

PER_TOKEN_VECTORS = 200
"""Bytes a token of what plans leave out: the loss's vectors (about 20 float32 and masks), ids and
masks of the vocabulary-parallel embedding."""


def write_model(directory: Path, family: str = "qwen2", **sizes: Any) -> Path:
    """config.json of a small model whose dimensions have no common value; no weights."""
    table = {
        "vocab_size": 500,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": False,
    }
    FAMILIES[family](**table | sizes).save_pretrained(directory)
    return directory


def run_config(model: Path, dtype: str = "float32", rows: int = 1, **learner: Any) -> RunConfig:
    """A run on processors with one update of `rows` micro-batches, each of TOKENS tokens."""
    return parse(
        {
            "run": {"name": "plan", "total_steps": 1},
            "model": {"path": str(model), "dtype": dtype},
            "prompts": {"train": "unused", "max_tokens": TOKENS // 4},
            "rollout": {
                "max_response_tokens": TOKENS // 4,
                "prompts_per_step": rows,
                "group_size": 2 * learner.get("data_parallel", 1),
            },
            "reward": {"overlong_punishment": False},
            "eval": {"every": 0},
            "learner": {"mini_batches": 1, "micro_batch_tokens": TOKENS, **learner},
            "hardware": {"gpus_per_node": 0},
        }
    )


def build_policy(config: RunConfig, here: Processes) -> Policy:
    policy = Policy.of(config, Path(config.model.path), here, temperature=1.0)
    policy.load(RandomSource(policy.shape, 0.05, 0))
    return policy


def architecture(config: RunConfig) -> Architecture:
    return Architecture.read(Path(config.model.path))


def random_row(policy: Policy, seed: int = 0) -> Row:
    token_ids = np.random.default_rng(seed).integers(3, policy.shape.vocab, TOKENS)
    lengths = np.array([TOKENS // 2, TOKENS // 2])
    every = np.ones(TOKENS, bool)
    return forward.row(policy, token_ids, np.roll(token_ids, -1), lengths, every)


def loss_inputs(config: RunConfig) -> LossInputs:
    return LossInputs(
        old_logprobs=torch.zeros(TOKENS),
        rollout_logprobs=None,
        ref_logprobs=None,
        advantages=torch.ones(TOKENS),
        token_weights=torch.full((TOKENS,), 1 / TOKENS),
        rule=config.loss,
    )


def held_bytes(policy: Policy) -> tuple[int, int, int]:
    """Bytes of parameters, main gradients, and what a new optimizer keeps beside them."""
    settings = AdamSettings(weight_decay=0.1, beta1=0.9, beta2=0.999, eps=1e-8, grad_clip=1.0)
    gradients = sum(_bytes(buffer.grad_data) for buffer in policy.ddp.buffers)
    optimizer = 0
    for shard in Optimizer(policy, settings).shards:
        optimizer += sum(map(_bytes, shard.moments.values()))
        optimizer += _bytes(shard.main) if shard.has_main_copy else 0
    return sum(map(_bytes, policy.module.parameters())), gradients, optimizer


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class Allocated:
    """Bytes, from the allocator itself."""

    kept: int
    """More at the end than at the start."""
    peak: int
    """Most at a time, beside what was there at the start."""


def allocated(run: Callable[[], object]) -> Allocated:
    """What a call takes from torch's allocator, temporaries inside of kernels included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    del result
    return Allocated(int(sizes[-1]), int(sizes.max()))


def update_peak(policy: Policy, config: RunConfig, rows: int = 1, passes: int = 1) -> int:
    """Bytes at the peak of the forward and backward passes of one update, beside what stays.

    Args:
        policy: the model.
        config: of the run.
        rows: micro-batches.
        passes: the least of so many; gloo's threads let go of what they sent a little late.
    """
    micro_batches = [random_row(policy, seed) for seed in range(rows)]
    inputs = loss_inputs(config)

    def update() -> object:
        return forward.forward_backward_dapo(policy, micro_batches, lambda _: inputs)

    found = []
    for _ in range(passes):
        mpu.get_global_memory_buffer().buffer.clear()  # so that each pass takes its own
        found.append(allocated(update).peak)
    return min(found)


def kept_bytes(policy: Policy, config: RunConfig) -> int:
    """Bytes that autograd keeps of a forward pass through layers and final norm: each storage once,
    without parameters and without what belongs to the micro-batch."""
    row = random_row(policy)
    sequences = row.sequences.with_angles(policy.rotary)
    given = [*policy.module.parameters(), sequences.cos, sequences.sin]
    known = {tensor.untyped_storage().data_ptr() for tensor in given if tensor is not None}
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    decoder = policy.module.decoder
    decoder.register_forward_pre_hook(lambda *_: hooks.__enter__())
    decoder.register_forward_hook(lambda *_: hooks.__exit__())
    assert policy.head is not None, "measured where all layers are on one stage"
    policy.head.job = Train(row.targets, loss_inputs(config))
    policy.ddp(row.token_ids, None, None, packed_seq_params=sequences)
    return sum(storage.nbytes() for storage in storages.values())


def agrees(planned: float, measured: float, tolerance: float) -> bool:
    return abs(planned - measured) <= tolerance * measured
