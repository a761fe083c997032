"""Memory of a GPU that samples: what vLLM is given, and what of it is left for the cache."""

from __future__ import annotations

from dataclasses import dataclass

from dapo_hpc.config import RunConfig
from dapo_hpc.plan.activations import FLOAT32
from dapo_hpc.plan.architecture import Architecture
from dapo_hpc.plan.memory import CONTEXT_BYTES, ELEMENT_BYTES, GIB, device_of
from dapo_hpc.plan.parameters import layer_elements, table_elements

DEFAULT_BATCHED_TOKENS = 16384
"""vLLM's own choice for an engine in Python on GPUs of 70 GiB and more; smaller ones take fewer."""
SAMPLER_COPIES = 3
"""Logits of every sequence, their log-softmax and the sampler's copy, float32. Not measured."""
ROOM_FRAC = 0.9
"""Highest gpu_memory_frac that is proposed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """Bytes on each GPU of an engine. On processors the budget is the cache alone."""

    budget: int
    """What rollout.gpu_memory_frac allows."""
    weights: int
    work: int
    """Not derived: CUDA context, activations of an engine step, the sampler."""
    cache: int
    """The rest: keys and values. Negative if there is none."""
    cache_tokens: int
    """Tokens that the caches of the engine's GPUs hold together."""
    full_sequences: int
    """Responses of full length, with their prompts, that fit at a time."""


def engine_memory(architecture: Architecture, config: RunConfig) -> EngineMemory:
    weights = _weights(architecture, config)
    work = 0
    if device_of(config) == "cuda":
        budget = int(config.rollout.gpu_memory_frac * config.hardware.gpu_memory_gib * GIB)
        work = _work(architecture, config)
        cache = budget - weights - work
    else:
        cache = budget = config.rollout.cpu_cache_gib * GIB
    tokens = max(0, cache) // _token_bytes(architecture, config)
    return EngineMemory(
        budget=budget,
        weights=weights,
        work=work,
        cache=cache,
        cache_tokens=tokens,
        full_sequences=tokens // config.max_sequence_tokens,
    )


def engine_problems(architecture: Architecture, config: RunConfig) -> list[str]:
    """Why vLLM would refuse, or could not hold a single response."""
    rollout, found = config.rollout, []
    if not can_split(architecture, rollout.tensor_parallel):
        found.append(
            f"rollout.tensor_parallel = {rollout.tensor_parallel} does not fit the "
            f"{architecture.heads} heads and {architecture.kv_heads} key-value heads of "
            f"{architecture.name}: it must divide the former, and divide or be a multiple of the "
            "latter."
        )
        return found
    if architecture.max_positions and config.max_sequence_tokens > architecture.max_positions:
        found.append(
            f"prompts.max_tokens + rollout.max_response_tokens = {config.max_sequence_tokens}, but "
            f"{architecture.name} has max_position_embeddings = {architecture.max_positions}; vLLM "
            "refuses longer sequences. Lower rollout.max_response_tokens."
        )
    memory = engine_memory(architecture, config)
    if not memory.full_sequences:
        found.append(_too_small(architecture, config, memory))
    return found


def _too_small(architecture: Architecture, config: RunConfig, memory: EngineMemory) -> str:
    rollout = config.rollout
    if device_of(config) == "cpu":
        return (
            f"rollout.cpu_cache_gib = {rollout.cpu_cache_gib} holds {memory.cache_tokens} tokens, "
            f"less than one response of full length ({config.max_sequence_tokens} with its "
            "prompt). Raise it."
        )
    return (
        f"an engine's cache would hold {memory.cache_tokens} tokens, less than one response of "
        f"full length ({config.max_sequence_tokens} with its prompt): of "
        f"{config.hardware.gpu_memory_gib:g} GiB, rollout.gpu_memory_frac = "
        f"{rollout.gpu_memory_frac:g} allows {memory.budget / GIB:.1f}, weights take "
        f"{memory.weights / GIB:.1f} and the rest of vLLM about {memory.work / GIB:.1f}. "
        f"{_cheapest(architecture, config)}"
    )


def _cheapest(architecture: Architecture, config: RunConfig) -> str:
    """More of the same GPUs first, then more GPUs for each engine."""
    rollout = config.rollout
    ranks = rollout.tensor_parallel
    while ranks <= config.hardware.gpus_per_node:
        for frac in sorted({rollout.gpu_memory_frac, max(ROOM_FRAC, rollout.gpu_memory_frac)}):
            change = {"tensor_parallel": ranks, "gpu_memory_frac": frac}
            changed = rollout.model_copy(update=change)
            tried = config.model_copy(update={"rollout": changed})
            is_possible = can_split(architecture, ranks)
            if is_possible and engine_memory(architecture, tried).full_sequences:
                return f"Cheapest change: {_changes(config, change)}."
        ranks *= 2
    return "No engine inside one node has room for it: take larger GPUs, or shorter responses."


def _changes(config: RunConfig, wanted: dict[str, float]) -> str:
    now = config.rollout.model_dump()
    return ", ".join(f"rollout.{k} = {v:g}" for k, v in wanted.items() if now[k] != v)


def can_split(architecture: Architecture, ranks: int) -> bool:
    """Whether vLLM can deal the heads of a model out to as many GPUs."""
    kv_heads = architecture.kv_heads
    return architecture.heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def _rank_kv_heads(architecture: Architecture, config: RunConfig) -> int:
    """On one GPU; ranks beyond their number hold copies."""
    return max(1, architecture.kv_heads // config.rollout.tensor_parallel)


def _weights(architecture: Architecture, config: RunConfig) -> int:
    ranks = config.rollout.tensor_parallel
    layer = layer_elements(architecture, ranks, _rank_kv_heads(architecture, config))
    tables = 1 if architecture.is_tied else 2
    elements = architecture.num_layers * layer + architecture.hidden
    elements += tables * table_elements(architecture, ranks)
    return elements * ELEMENT_BYTES[config.model.dtype]


def _token_bytes(architecture: Architecture, config: RunConfig) -> int:
    """Key and value of a token in all layers, on one GPU."""
    width = 2 * _rank_kv_heads(architecture, config) * architecture.head_dim
    return architecture.num_layers * width * ELEMENT_BYTES[config.model.dtype]


def _work(architecture: Architecture, config: RunConfig) -> int:
    rollout, e = config.rollout, ELEMENT_BYTES[config.model.dtype]
    tokens = rollout.max_batched_tokens or DEFAULT_BATCHED_TOKENS
    width = 4 * architecture.hidden + 3 * architecture.ffn // rollout.tensor_parallel
    sampler = rollout.max_sequences * architecture.vocab * FLOAT32 * SAMPLER_COPIES
    return CONTEXT_BYTES + tokens * width * e + sampler
