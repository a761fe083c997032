"""The packed Megatron model computes what transformers computes: forward, backward and update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
from torch import Tensor

from dapo_hpc.learner.forward import Row, forward_backward, log_probs, row
from dapo_hpc.learner.model import Policy
from dapo_hpc.learner.optimizer import AdamSettings, Optimizer
from dapo_hpc.learner.parallel import Processes
from dapo_hpc.weights import names
from dapo_hpc.weights.source import SafetensorsSource
from tests.learner_parts import VOCAB, make_model

CASES = [
    ("qwen2", False),  # biases on q, k, v
    ("qwen2", True),  # output layer tied to the embedding
    ("qwen3", True),  # norms on q and k, head size apart from hidden / heads
    ("llama", False),  # neither
]
LENGTHS = np.array([7, 20, 3, 1, 15, 90])
"""A single token, equal and very different lengths."""
TEMPERATURE = 0.7
TOLERANCE = 1e-4
"""Nats; both sides are float32 and sum in different orders."""


def load(directory: Path, here: Processes, temperature: float = TEMPERATURE) -> Policy:
    policy = Policy(directory, here, dtype=torch.float32, temperature=temperature)
    policy.load(SafetensorsSource(directory))
    return policy


def packed(policy: Policy, lengths: np.ndarray = LENGTHS) -> tuple[Row, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    # Not the padding token: transformers gives its embedding no gradient.
    tokens = rng.integers(3, VOCAB, lengths.sum())
    targets = rng.integers(0, VOCAB, lengths.sum())
    return row(policy, tokens, targets, lengths), tokens, targets


def truth(
    model: Any, tokens: np.ndarray, targets: np.ndarray, lengths: np.ndarray = LENGTHS
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy by transformers, one sequence at a time."""
    logprobs, entropies = [], []
    for ids, wanted in zip(
        np.split(tokens, np.cumsum(lengths)[:-1]),
        np.split(targets, np.cumsum(lengths)[:-1]),
        strict=True,
    ):
        logits = model(torch.from_numpy(ids)[None]).logits[0] / TEMPERATURE
        distribution = torch.log_softmax(logits, -1)
        logprobs.append(distribution.gather(1, torch.from_numpy(wanted)[:, None])[:, 0])
        entropies.append(-(distribution.exp() * distribution).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_log_probs_entropy_gradients_and_step(
    family: str, tied: bool, here: Processes, tmp_path: Path
) -> None:
    model = make_model(tmp_path, family, tied=tied)
    policy = load(tmp_path, here)
    one_row, tokens, targets = packed(policy)
    expected, expected_entropy = truth(model, tokens, targets)
    ((found, entropy),) = log_probs(policy, [one_row])
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(entropy, expected_entropy.detach(), rtol=0, atol=TOLERANCE)

    weights = torch.rand(len(tokens), generator=torch.Generator().manual_seed(1))
    settings = AdamSettings(weight_decay=0.1, beta1=0.9, beta2=0.999, eps=1e-8, grad_clip=1.0)
    optimizer = Optimizer(policy, settings)
    optimizer.zero_grad()
    stats = forward_backward(
        policy, [one_row], lambda _n, lp, _e: (-(lp * weights).sum(), lp.detach())
    )
    assert torch.equal(stats[0], found), "training and scoring must give the same bits"
    (-(expected * weights).sum()).backward()
    assert worst_gradient(policy, model) < 1e-5

    update = optimizer.step(1e-2)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert update.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    reference_step(model)
    exported = dict(policy.export())
    for name, value in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            # Adam's first step is lr * sign(gradient), so noise decides where the gradient is 0.
            assert (exported[name] - value).abs().max() < 1e-3, name


def worst_gradient(policy: Policy, model: Any) -> float:
    """Largest difference of any gradient, relative to that tensor's largest gradient."""
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    worst = 0.0
    for name, parameter in policy.module.named_parameters():
        entry = names.entry(policy.shape, name)
        found = names.merge(entry.kind, [parameter.main_grad], policy.shape)
        for hf_name, gradient in zip(entry.hf_names, found, strict=True):
            scale = expected[hf_name].abs().max()
            worst = max(worst, float((gradient - expected[hf_name]).abs().max() / scale))
    return worst


def reference_step(model: Any) -> None:
    """AdamW of torch; norms and biases do not decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=1e-2).step()


def test_sequences_of_a_row_do_not_see_each_other(here: Processes, tmp_path: Path) -> None:
    """Negative control: the same tokens as one long sequence give other log-probs."""
    model = make_model(tmp_path)
    policy = load(tmp_path, here)
    _, tokens, targets = packed(policy)
    one = np.array([len(tokens)])
    ((joined, _),) = log_probs(policy, [row(policy, tokens, targets, one)])
    expected, _ = truth(model, tokens, targets)
    assert (joined - expected).abs().max() > 100 * TOLERANCE
    expected, _ = truth(model, tokens, targets, one)
    assert (joined - expected).abs().max() < TOLERANCE


def test_an_empty_row_has_no_log_probs(here: Processes, tmp_path: Path) -> None:
    make_model(tmp_path)
    policy = load(tmp_path, here)
    nothing = np.zeros(0, np.int64)
    ((found, _),) = log_probs(policy, [row(policy, nothing, nothing, nothing)])
    assert found.shape == (0,)


def test_a_gradient_that_is_not_finite_is_skipped(here: Processes, tmp_path: Path) -> None:
    make_model(tmp_path)
    policy = load(tmp_path, here)
    settings = AdamSettings(weight_decay=0.1, beta1=0.9, beta2=0.999, eps=1e-8, grad_clip=1.0)
    optimizer = Optimizer(policy, settings)
    before = [p.detach().clone() for p in policy.module.parameters()]
    one_row, *_ = packed(policy)
    for factor, is_skipped in ((float("nan"), True), (1.0, False)):
        optimizer.zero_grad()
        forward_backward(policy, [one_row], lambda _n, lp, _e, f=factor: (f * lp.sum(), None))
        assert optimizer.step(1e-3).is_skipped is is_skipped
        after = list(policy.module.parameters())
        is_same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert is_same is is_skipped


def test_a_model_this_learner_cannot_train_is_refused(here: Processes, tmp_path: Path) -> None:
    model = make_model(tmp_path, "llama")
    model.config.attention_bias = True
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attention_bias"):
        Policy(tmp_path, here, dtype=torch.float32, temperature=1.0)
