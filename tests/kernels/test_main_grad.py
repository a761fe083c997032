"""The output weight's gradient under Megatron's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kernel_backends import torch_alone
from logprob_truth import BF16_ROUNDING
from torch import Tensor

from dapo_kernels import linear_dapo_loss, linear_logprob

ROWS, SIZE, TOKENS = 11, 6, 9
Function = Callable[..., Tensor]


def by_logprob(hidden: Tensor, weight: Tensor, ids: Tensor, valid_vocab: int = ROWS) -> Tensor:
    logprobs, _ = linear_logprob(hidden, weight, ids, valid_vocab=valid_vocab, chunk_tokens=4)
    return (logprobs * signs(len(ids)).to(logprobs)).sum()


def by_loss(hidden: Tensor, weight: Tensor, ids: Tensor, valid_vocab: int = ROWS) -> Tensor:
    """On policy the gradient is minus the advantage; main_grad is written in the forward."""
    weights = torch.ones(len(ids), device=hidden.device)
    loss, _ = linear_dapo_loss(
        hidden,
        weight,
        ids,
        None,
        None,
        -signs(len(ids)).to(hidden.device),
        weights,
        clip_low=0.2,
        clip_high=0.28,
        valid_vocab=valid_vocab,
        chunk_tokens=4,
    )
    return loss


def signs(num_tokens: int) -> Tensor:
    return torch.linspace(-1.0, 1.0, num_tokens)


def plain_gradient(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """By autograd, float64, on the host."""
    leaf = weight.detach().cpu().double().requires_grad_()
    logprobs = torch.log_softmax(hidden.detach().cpu().double() @ leaf.t(), -1)
    (logprobs[torch.arange(len(ids)), ids.cpu()] * signs(len(ids)).double()).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def draw(seed: int = 0, device: str = "cpu") -> tuple[Tensor, torch.nn.Parameter, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, SIZE, generator=generator)
    weight = torch.randn(ROWS, SIZE, generator=generator)
    ids = torch.randint(0, ROWS, (TOKENS,), generator=generator)
    return hidden.to(device), torch.nn.Parameter(weight.to(device)), ids.to(device)


def with_main_grad(weight: torch.nn.Parameter) -> Any:
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    return weight


BOTH = pytest.mark.parametrize("function", [by_logprob, by_loss])


@BOTH
def test_micro_batches_add_up_in_main_grad(device: str, function: Function) -> None:
    hidden, weight, ids = draw(device=device)
    held = with_main_grad(weight)
    for _ in range(3):
        function(hidden, held, ids).backward()
    expected = 3 * plain_gradient(hidden, weight, ids)
    torch.testing.assert_close(held.main_grad.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    assert held.grad_added_to_main_grad is True
    assert torch.equal(held.grad, torch.zeros_like(held))


@torch_alone
@BOTH
def test_bfloat16_weights_keep_small_gradients(device: str, function: Function) -> None:
    """64 micro-batches: float32 sums keep what a bfloat16 sum stops seeing."""
    hidden, weight, ids = draw(device=device)
    hidden = hidden.bfloat16()
    held = with_main_grad(torch.nn.Parameter(weight.detach().bfloat16()))
    plain = torch.nn.Parameter(held.detach().clone())
    first = None
    for _ in range(64):
        function(hidden, held, ids).backward()
        function(hidden, plain, ids).backward()
        first = held.main_grad.clone() if first is None else first
    # What a micro-batch adds is rounded on its way, but every time alike.
    scale = held.main_grad.abs().max()
    assert plain.grad is not None
    assert (held.main_grad - 64 * first).abs().max() < 1e-5 * scale
    assert (plain.grad - 64 * first).abs().max() > 1e-2 * scale
    expected = 64 * plain_gradient(hidden, held, ids)
    assert (held.main_grad.cpu() - expected).abs().max() < 2 * BF16_ROUNDING * scale


@BOTH
def test_padding_rows_of_main_grad_are_not_touched(device: str, function: Function) -> None:
    hidden, weight, ids = draw(device=device)
    held = with_main_grad(weight)
    held.main_grad.fill_(7.0)
    function(hidden, held, ids.clamp(max=7), 8).backward()
    assert (held.main_grad[8:] == 7.0).all()
    assert (held.main_grad[:8] != 7.0).all()


@BOTH
def test_gradient_of_hidden_alone_leaves_main_grad(device: str, function: Function) -> None:
    hidden, weight, ids = draw(device=device)
    held = with_main_grad(weight)
    held.requires_grad_(False)
    hidden.requires_grad_()
    function(hidden, held, ids).backward()
    assert hidden.grad is not None
    assert (held.main_grad == 0).all()
    assert held.grad_added_to_main_grad is False


@BOTH
def test_scoring_leaves_main_grad(device: str, function: Function) -> None:
    hidden, weight, ids = draw(device=device)
    held = with_main_grad(weight)
    with torch.no_grad():
        function(hidden, held, ids)
    assert (held.main_grad == 0).all()
    assert held.grad_added_to_main_grad is False


class TinyModel(torch.nn.Module):
    """An embedding, and an output weight that is the same parameter or another."""

    def __init__(self, *, is_tied: bool) -> None:
        super().__init__()
        _, self.embedding, _ = draw(1)
        self.output = None if is_tied else draw(2)[1]

    def forward(self, ids: Tensor, targets: Tensor, function: Function | None = None) -> Tensor:
        hidden = torch.nn.functional.embedding(ids, self.embedding)
        weight = self.embedding if self.output is None else self.output
        if function is not None:
            return function(hidden, weight, targets)
        logprobs = torch.log_softmax(hidden @ weight.t(), -1)[torch.arange(len(ids)), targets]
        return (logprobs * signs(len(ids)).to(logprobs)).sum()


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Megatron's data parallelism over one gloo process."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    from dapo_hpc.learner import cpu

    cpu.install()
    from megatron.core import parallel_state

    store: Path = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 1), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    import megatron.core.distributed as distributed

    yield distributed
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@BOTH
@pytest.mark.parametrize("is_tied", [False, True])
def test_trap_25_megatron_data_parallel(megatron: Any, is_tied: bool, function: Function) -> None:
    """main_grad of every parameter after two micro-batches, tied embeddings included."""
    from megatron.core.transformer import TransformerConfig

    from dapo_hpc.learner import cpu

    model = TinyModel(is_tied=is_tied)
    if is_tied:
        # Megatron sets it on tied weights: the embedding's part arrives by autograd beside ours.
        model.embedding.zero_out_wgrad = True  # type: ignore[attr-defined]
    config = TransformerConfig(num_layers=1, hidden_size=SIZE, num_attention_heads=1)
    settings = megatron.DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    with cpu.cuda_calls_on_cpu():
        parallel = megatron.DistributedDataParallel(config, settings, model)
    parallel.zero_grad_buffer()
    plain = TinyModel(is_tied=is_tied).double()
    for seed in (3, 4):
        _, _, ids = draw(seed)
        _, _, targets = draw(seed + 10)
        parallel(ids, targets, function).backward()
        plain(ids, targets).backward()
    for (name, ours), true in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert true.grad is not None
        torch.testing.assert_close(
            ours.main_grad.double(),  # type: ignore[attr-defined]
            true.grad,
            rtol=1e-5,
            atol=1e-6,
            msg=name,
        )
