"""A learner's memory, planned, against tensors and allocator of a real model in one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import numpy as np
import torch

from dapo_hpc.config import parse
from dapo_hpc.learner import batch
from dapo_hpc.learner.batch import Micro
from dapo_hpc.learner.packing import plan_step
from dapo_hpc.learner.parallel import Processes
from dapo_hpc.learner.reference import Reference
from dapo_hpc.plan.memory import (
    CONTEXT_BYTES,
    ROW_TOKEN_BYTES,
    TOKEN_BYTES,
    RankMemory,
    learner_memory,
)
from dapo_hpc.records import Group
from tests.learner_parts import make_config, make_group, make_model, summarize
from tests.unit.plan.measuring import (
    PER_TOKEN_VECTORS,
    TOKENS,
    agrees,
    allocated,
    architecture,
    build_policy,
    held_bytes,
    run_config,
    update_peak,
    write_model,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "tied", "freeze"),
    [
        ("qwen2", False, ()),  # biases
        ("qwen3", True, ()),  # norms on q and k; one table
        ("llama", False, ("embedding", "layers.1-2")),
    ],
)
def test_what_stays_is_planned_to_the_byte(
    family: str, tied: bool, freeze: tuple[str, ...], dtype: str, tmp_path: Path, here: Processes
) -> None:
    model = write_model(tmp_path, family, tie_word_embeddings=tied, vocab_size=501)
    config = run_config(model, dtype, freeze=freeze)
    (planned,) = learner_memory(architecture(config), config)
    assert held_bytes(build_policy(config, here)) == (
        planned.weights,
        planned.gradients,
        planned.optimizer,
    )


def test_the_reference_policy_is_a_second_copy(tmp_path: Path, here: Processes) -> None:
    config = run_config(write_model(tmp_path))
    assert learner_memory(architecture(config), config)[0].reference == 0
    config = config.model_copy(update={"loss": config.loss.model_copy(update={"kl_coef": 0.1})})
    policy = build_policy(config, here)
    copy = allocated(lambda: Reference(policy)).peak
    assert learner_memory(architecture(config), config)[0].reference == copy


@pytest.mark.parametrize(
    ("recompute", "dtype", "vocab"),
    [
        ("none", "float32", 500),  # the head needs most, at the end of the forward pass
        ("none", "float32", 8000),
        ("none", "bfloat16", 500),
        ("selective", "float32", 500),
        ("full", "float32", 8000),
        ("full", "float32", 64),  # a layer's backward pass needs most
        ("full", "bfloat16", 64),
    ],
)
def test_peak_of_an_update(
    recompute: str, dtype: str, vocab: int, tmp_path: Path, here: Processes
) -> None:
    config = run_config(write_model(tmp_path, vocab_size=vocab), dtype, recompute=recompute)
    (planned,) = learner_memory(architecture(config), config)
    measured = update_peak(build_policy(config, here), config)
    # On a processor, the norm of a bfloat16 row goes backward in float32.
    copies = 4 * 128 if dtype == "bfloat16" else 0
    tolerance = (PER_TOKEN_VECTORS + copies) * TOKENS / measured
    assert tolerance < 0.08, "1 % in most cases"
    assert agrees(planned.activations + planned.passing, measured, tolerance)


def test_a_wrong_plan_of_the_peak_is_noticed(tmp_path: Path, here: Processes) -> None:
    """Negative controls: a layer too many, no recompute planned, the head forgotten."""
    config = run_config(write_model(tmp_path), recompute="full")
    size = architecture(config)
    measured = update_peak(build_policy(config, here), config)

    def fits(planned: RankMemory) -> bool:
        return agrees(planned.activations + planned.passing, measured, 0.02)

    (planned,) = learner_memory(size, config)
    assert fits(planned)
    assert not fits(replace(planned, head=0, backward=0))
    assert not fits(learner_memory(replace(size, num_layers=5), config)[0])
    without = config.model_copy(
        update={"learner": config.learner.model_copy(update={"recompute": "none"})}
    )
    assert not fits(learner_memory(size, without)[0])


def test_bytes_of_a_train_batch(tmp_path: Path, here: Processes) -> None:
    """All micro-batches of a step lie on the device at once: this many bytes for each token."""
    make_model(tmp_path / "model")
    config = make_config(tmp_path / "model", tmp_path)
    policy = build_policy(config, here)
    rng = np.random.default_rng(0)
    groups = dict(enumerate(make_group(number, rng) for number in range(4)))
    summaries = [summarize(group) for group in groups.values()]
    plan = plan_step(summaries, mini_batches=2, micro_batch_tokens=64, data_parallel=1, seed=0)
    built = batch.build(policy, config, plan, summaries, groups)
    tokens, trained = _num_tokens(groups)
    # Rows name the tokens that train, as int64; plans count every token.
    planned = tokens * (TOKEN_BYTES + ROW_TOKEN_BYTES) - 8 * (tokens - trained)
    measured = sum(_micro_bytes(micro) for micro in built.micros())
    # Where sequences of a run have one length, attention needs no place of each token.
    without_places = measured + 8 * tokens
    assert measured <= planned <= without_places


def _num_tokens(groups: dict[int, Group]) -> tuple[int, int]:
    """Of prompts and responses; of responses."""
    prompts = sum(len(g.prompt.token_ids) * len(g.responses) for g in groups.values())
    responses = sum(len(r.token_ids) for g in groups.values() for r in g.responses)
    return prompts + responses, responses


def _micro_bytes(micro: Micro) -> int:
    """Per-token tensors alone: not the few numbers for each sequence."""
    packed, row = micro.tokens, micro.row
    tensors = [
        packed.token_ids,
        packed.positions,
        packed.targets,
        packed.loss_mask,
        packed.advantages,
        packed.token_weights,
        packed.rollout_logprobs,
        packed.sampling_steps,
        row.token_ids.clone(),
        row.targets.token_ids.clone(),
        row.targets.places,
        row.sequences.positions,
        *(run.slots for run in row.sequences.runs if run.slots is not None),
    ]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


# ------------------------------------------------------------------ what nothing here can measure


def test_a_gpu_has_allowances_and_a_processor_has_none(tmp_path: Path) -> None:
    config = run_config(write_model(tmp_path))
    (on_cpu,) = learner_memory(architecture(config), config)
    table = config.model_dump()
    table["hardware"]["gpus_per_node"] = 8
    (on_gpu,) = learner_memory(architecture(config), parse(table))
    assert on_cpu.allowance == 0
    changing = on_gpu.train_batch + on_gpu.activations + on_gpu.passing
    assert on_gpu.allowance == CONTEXT_BYTES + round(0.1 * changing)
    assert on_gpu.total == (
        on_gpu.weights + on_gpu.gradients + on_gpu.optimizer + changing + on_gpu.allowance
    )
