"""The chunk of log-probs, planned, against the tensors of dapo_kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dapo_hpc.plan import passing
from dapo_hpc.plan.activations import Passes
from dapo_hpc.plan.memory import passes_of
from dapo_kernels import chunks, linear_dapo_loss
from tests.unit.plan.measuring import allocated, architecture, run_config, write_model


def test_constants_are_those_of_the_kernels() -> None:
    assert passing.CHUNK_TOKENS == chunks.CHUNK_TOKENS
    assert (passing.TILE, passing.ALIGNMENT) == (chunks._TILE, chunks._ALIGNMENT)


@pytest.fixture
def passes(tmp_path: Path) -> Passes:
    """On a GPU; 501 words, which no alignment likes."""
    config = run_config(write_model(tmp_path, vocab_size=501), "bfloat16")
    return replace(passes_of(architecture(config), config), device="cuda")


@pytest.mark.parametrize(
    "tokens",
    [
        1,
        100,  # less than a tile
        2048,  # exactly a chunk
        2049,  # two of them, nearly equal
        22528,
    ],
)
def test_logits_of_a_chunk(tokens: int, passes: Passes) -> None:
    hidden, weight = torch.empty(tokens, 8), torch.empty(501, 8)
    plan = chunks.plan_chunks(
        "test",
        hidden,
        weight,
        torch.zeros(tokens, dtype=torch.int64),
        temperature=1.0,
        valid_vocab=None,
        group=None,
        rows=None,
        hidden_grad="partial",
        chunk_tokens=chunks.CHUNK_TOKENS,
        logits_dtype=None,
    )
    logits = plan.new_logits(hidden, plan.chunks(tokens))
    planned = passing.logits_bytes(replace(passes, tokens=tokens))
    assert logits.untyped_storage().nbytes() == planned


def test_the_torch_reference_holds_three_tensors_of_that_size() -> None:
    """CPU_COPIES, from the allocator; where the reference changes, so does the constant."""
    tokens, vocab = 512, 4000
    hidden = torch.randn(tokens, 16, requires_grad=True)
    weight = torch.randn(vocab, 16)
    vectors = [torch.zeros(tokens) for _ in range(3)]
    ids = torch.zeros(tokens, dtype=torch.int64)

    def loss() -> object:
        old, advantages, weights = vectors
        return linear_dapo_loss(
            hidden, weight, ids, old, None, advantages, weights, clip_low=0.2, clip_high=0.28
        )

    copies = allocated(loss).peak / (tokens * vocab * 4)
    assert copies == pytest.approx(passing.CPU_COPIES, abs=0.1)


def test_ranks_hold_two_chunks_of_a_share_of_the_vocabulary(passes: Passes) -> None:
    """The next chunk's logits are formed while statistics travel, if there is a next one."""
    two = passes.learner.model_copy(update={"tensor_parallel": 2})
    many = replace(passes, tokens=4096)
    one = passing.logits_bytes(many)
    assert passing.logits_bytes(replace(many, learner=two)) == 2 * one * 256 // 512
    single = replace(passes, tokens=2048)
    assert passing.logits_bytes(replace(single, learner=two)) == one * 256 // 512
