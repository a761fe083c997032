"""AdamW bit by bit as torch's own, clipping, skipped updates, frozen parameters, recompute."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
from torch import Tensor

from dapo_hpc.learner.forward import forward_backward, log_probs, row
from dapo_hpc.learner.model import Policy
from dapo_hpc.learner.optimizer import (
    CLIP_EPS,
    AdamSettings,
    Optimizer,
    TooManySkippedUpdates,
)
from dapo_hpc.learner.parallel import Processes
from dapo_hpc.learner.session import Session, open_session
from dapo_hpc.learner.step import rollout_step
from dapo_hpc.run_dir import RunDir
from dapo_hpc.weights.source import SafetensorsSource
from tests.learner_parts import VOCAB, FakeBuffer, make_config, make_model

SETTINGS: dict[str, Any] = {
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-8,
    "grad_clip": 1e9,
    "max_skipped_updates": 3,
}
UNCLIPPED, CLIPPED = 1e9, 1.0
RATES = (1e-2, 3e-3, 0.0, 5e-2)


def build(
    model: Path, here: Processes, *, grad_clip: float = UNCLIPPED, **policy: Any
) -> tuple[Policy, Optimizer]:
    options = {"dtype": torch.float32, "temperature": 1.0, **policy}
    built = Policy(model, here, **options)
    built.load(SafetensorsSource(model))
    return built, Optimizer(built, AdamSettings(**{**SETTINGS, "grad_clip": grad_clip}))


def fill(policy: Policy, optimizer: Optimizer, seed: int) -> None:
    """Random gradients; some of them tiny, some 0."""
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    for parameter in policy.module.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 10.0 ** torch.randint(-8, 1, parameter.shape, generator=generator)
            parameter.main_grad.copy_(noise * scale * (noise > -1.0))


class Truth:
    """torch.optim.AdamW on float32 copies, clipped by hand."""

    def __init__(self, policy: Policy, grad_clip: float) -> None:
        self.copies = [p.detach().clone().float() for p in policy.module.parameters()]
        self._clip = grad_clip
        groups = [
            {"params": [c for c in self.copies if c.ndim > 1], "weight_decay": 0.1},
            {"params": [c for c in self.copies if c.ndim == 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.99), eps=1e-8, fused=True)

    def step(self, policy: Policy, lr: float, norm: float) -> None:
        scale = min(1.0, self._clip / (norm + CLIP_EPS))
        for copy, parameter in zip(self.copies, policy.module.parameters(), strict=True):
            grad = parameter.main_grad.clone()
            copy.grad = grad * scale if scale < 1.0 else grad
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()


@pytest.mark.parametrize("grad_clip", [UNCLIPPED, CLIPPED])
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_torch_adamw_bit_by_bit(
    dtype: torch.dtype, distributed: bool, grad_clip: float, here: Processes, tmp_path: Path
) -> None:
    make_model(tmp_path, "qwen2")
    policy, optimizer = build(
        tmp_path, here, grad_clip=grad_clip, dtype=dtype, distributed_optimizer=distributed
    )
    truth = Truth(policy, grad_clip)
    for seed, lr in enumerate(RATES):
        fill(policy, optimizer, seed)
        grads = [p.main_grad.clone() for p in policy.module.parameters()]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        done = optimizer_step_and_truth(policy, optimizer, truth, lr, grads)
        assert done == pytest.approx(norm, rel=1e-6)
        assert done > CLIPPED
    named = {id(p): copy for p, copy in zip(policy.module.parameters(), truth.copies, strict=True)}
    assert len(optimizer.shards) == len(truth.copies)
    for shard in optimizer.shards:
        expected = named[id(shard.parameter)]
        state = truth.adam.state[expected]
        assert torch.equal(shard.main.view(-1), expected.view(-1)), shard.name
        assert torch.equal(shard.parameter, expected.to(dtype)), shard.name
        for name, moment in shard.moments.items():
            assert torch.equal(moment.view(-1), state[name].view(-1)), (shard.name, name)
    assert optimizer.num_updates == len(RATES)


def optimizer_step_and_truth(
    policy: Policy, optimizer: Optimizer, truth: Truth, lr: float, grads: list[Tensor]
) -> float:
    """Step both; clipping scales main gradients in place, so the truth gets them as they were."""
    norm = optimizer.step(lr).grad_norm
    for parameter, grad in zip(policy.module.parameters(), grads, strict=True):
        parameter.main_grad.copy_(grad)
    truth.step(policy, lr, norm)
    return norm


def test_another_optimizer_does_not_pass(here: Processes, tmp_path: Path) -> None:
    """Negative control: weight decay on norms and biases is seen."""
    make_model(tmp_path, "qwen2")
    policy, optimizer = build(tmp_path, here)
    truth = Truth(policy, UNCLIPPED)
    truth.adam.param_groups[1]["weight_decay"] = 0.1
    fill(policy, optimizer, 0)
    grads = [p.main_grad.clone() for p in policy.module.parameters()]
    optimizer_step_and_truth(policy, optimizer, truth, 1e-2, grads)
    pairs = list(zip(policy.module.parameters(), truth.copies, strict=True))
    assert all(torch.equal(p, copy) == (p.ndim > 1) for p, copy in pairs)


# ------------------------------------------------------------------ updates that are skipped


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("distributed", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing(
    value: float,
    distributed: bool,
    here: Processes,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_model(tmp_path)
    policy, optimizer = build(tmp_path, here, distributed_optimizer=distributed)
    fill(policy, optimizer, 0)
    optimizer.step(1e-2)
    before = state_of(policy, optimizer)
    fill(policy, optimizer, 1)
    name, parameter = list(policy.module.named_parameters())[5]
    parameter.main_grad.view(-1)[-1] = value
    with caplog.at_level(logging.WARNING):
        done = optimizer.step(1e-2, at="step 12, update 3")
    assert done.is_skipped
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(policy, optimizer), strict=True))
    assert optimizer.num_updates == 1
    for part in ("step 12, update 3", name, "1 in a row", "optimizer.max_skipped_updates = 3"):
        assert part in caplog.text
    fill(policy, optimizer, 2)
    assert not optimizer.step(1e-2).is_skipped
    assert (optimizer.num_updates, optimizer.num_skipped_in_a_row) == (2, 0)
    assert not torch.equal(before[0], state_of(policy, optimizer)[0])


def state_of(policy: Policy, optimizer: Optimizer) -> list[Tensor]:
    moments = [moment for shard in optimizer.shards for moment in shard.moments.values()]
    return [t.detach().clone() for t in [*policy.module.parameters(), *moments]]


def test_too_many_in_a_row_stop_the_learner(here: Processes, tmp_path: Path) -> None:
    make_model(tmp_path)
    policy, optimizer = build(tmp_path, here)

    def spoiled(at: str) -> None:
        optimizer.zero_grad()
        next(policy.module.parameters()).main_grad.fill_(math.nan)
        optimizer.step(1e-2, at=at)

    spoiled("first")
    spoiled("second")
    fill(policy, optimizer, 0)
    optimizer.step(1e-2)  # a good one in between
    spoiled("third")
    spoiled("fourth")
    with pytest.raises(
        TooManySkippedUpdates, match=r"fifth: the gradient norm is nan .*3 in a row"
    ):
        spoiled("fifth")


def rollout_session(here: Processes, root: Path, **learner: Any) -> Session:
    make_model(root / "model")
    config = make_config(root / "model", root, learner={"mini_batches": 4, **learner})
    run = RunDir(config.run_dir)
    run.root.mkdir(parents=True)
    session = open_session(run, config, here, FakeBuffer())
    session.resume()
    return session


def test_a_step_goes_on_after_a_skipped_update_and_counts_it(
    here: Processes, tmp_path: Path
) -> None:
    session = rollout_session(here, tmp_path, micro_batch_tokens=4096)  # a backward pass an update
    passes: list[int] = []

    def spoil_the_second(grad: Tensor) -> Tensor:
        passes.append(1)
        return grad * math.nan if len(passes) == 2 else grad

    session.policy.module.decoder.final_layernorm.weight.register_hook(spoil_the_second)
    figures = [rollout_step(session, step) for step in (1, 2)]
    assert [row["learner/skipped_updates"] for row in figures] == [1.0, 0.0]
    assert session.optimizer.num_updates == 7
    assert all(p.isfinite().all() for p in session.policy.module.parameters())
    assert all(math.isfinite(row["learner/grad_norm"]) for row in figures)


# ------------------------------------------------------------------ frozen parameters


@pytest.mark.parametrize("pattern", ["output_layer", "embedding", "layers.1", "final_norm"])
def test_a_rollout_step_leaves_what_is_frozen(
    pattern: str, here: Processes, tmp_path: Path
) -> None:
    session = rollout_session(here, tmp_path, freeze=(pattern,))
    before = {n: p.detach().clone() for n, p in session.policy.module.named_parameters()}
    rollout_step(session, 1)
    frozen = pattern.replace("final_norm", "final_layernorm")
    for name, parameter in session.policy.module.named_parameters():
        assert torch.equal(parameter, before[name]) == (frozen in name), name


def test_patterns_that_fit_no_model_are_refused(here: Processes, tmp_path: Path) -> None:
    make_model(tmp_path / "tied", "qwen3", tied=True)
    make_model(tmp_path / "untied")
    with pytest.raises(ValueError, match=r"names layer 2, but the model has 2 layers, 0 to 1"):
        build(tmp_path / "untied", here, freeze=("layers.1-3",))
    with pytest.raises(ValueError, match=r'names "output_layer".*tie_word_embeddings'):
        build(tmp_path / "tied", here, freeze=("output_layer",))
    everything = ("embedding", "final_norm", "layers.0-1")
    with pytest.raises(ValueError, match="every parameter"):
        build(tmp_path / "tied", here, freeze=everything)
    policy, _ = build(tmp_path / "untied", here, freeze=everything)
    assert [n for n, p in policy.module.named_parameters() if p.requires_grad] == [
        "output_layer.weight"
    ]


# ------------------------------------------------------------------ recompute


def gradients(model: Path, here: Processes, **options: Any) -> dict[str, Tensor]:
    policy, optimizer = build(model, here, **options)
    rng = np.random.default_rng(0)
    lengths = np.array([9, 4, 17])
    tokens, targets = rng.integers(3, VOCAB, (2, lengths.sum()))
    packed = row(policy, tokens, targets, lengths)
    scored = log_probs(policy, [packed])[0][0]
    seen: list[Tensor] = []

    def loss(_number: int, logprobs: Tensor, _entropy: Tensor) -> tuple[Tensor, None]:
        seen.append(logprobs.detach().clone())
        return -logprobs.mean(), None

    optimizer.zero_grad()
    forward_backward(policy, [packed], loss)
    assert torch.equal(scored, seen[0]), "the ratio before the first update is exactly 1"
    return {
        name: parameter.main_grad.clone()
        for name, parameter in policy.module.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("freeze", [(), ("embedding",), ("embedding", "layers.0")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_gradients_have_the_same_bits(
    dtype: torch.dtype, freeze: tuple[str, ...], here: Processes, tmp_path: Path
) -> None:
    """With a frozen embedding too, where nothing below the first layer asks for a gradient."""
    make_model(tmp_path, "qwen3")
    kept = gradients(tmp_path, here, dtype=dtype, freeze=freeze)
    for recompute in ("selective", "full"):
        mine = gradients(tmp_path, here, dtype=dtype, freeze=freeze, recompute=recompute)
        assert mine.keys() == kept.keys()
        assert all(torch.equal(mine[name], kept[name]) for name in kept)
    assert all(gradient.abs().max() > 0 for gradient in kept.values())


def test_full_recompute_keeps_less_for_the_backward_pass(here: Processes, tmp_path: Path) -> None:
    """Bytes that autograd holds between the passes: nothing of what layers compute inside."""
    make_model(tmp_path, "qwen3")
    kept = {recompute: kept_bytes(tmp_path, here, recompute) for recompute in ("none", "full")}
    assert kept["full"] < 0.5 * kept["none"]


def kept_bytes(model: Path, here: Processes, recompute: str) -> int:
    policy, _ = build(model, here, recompute=recompute)
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(3, VOCAB, (2, 400))
    packed = row(policy, tokens, targets, np.array([400]))
    held: list[int] = []

    def loss(_number: int, logprobs: Tensor, _entropy: Tensor) -> tuple[Tensor, None]:
        held.append(sum(sizes.values()))
        return -logprobs.mean(), None

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward_backward(policy, [packed], loss)
    return held[0]
