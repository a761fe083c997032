"""The output weight's gradient under Megatron's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dapo_kernels import linear_logprob

ROWS, SIZE, TOKENS = 11, 6, 9


def logprob_sum(hidden: Tensor, weight: Tensor, ids: Tensor, *, valid_vocab: int = ROWS) -> Tensor:
    logprobs, _ = linear_logprob(
        hidden,
        weight,
        ids,
        temperature=1.0,
        vocab_start=0,
        valid_vocab=valid_vocab,
        group=None,
        chunk_tokens=4,
    )
    scale = torch.linspace(-1.0, 1.0, len(ids), dtype=logprobs.dtype)
    return (logprobs * scale).sum()


def plain_gradient(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """By autograd, float64."""
    leaf = weight.detach().double().requires_grad_()
    logprobs = torch.log_softmax(hidden.double() @ leaf.t(), -1)[torch.arange(len(ids)), ids]
    (logprobs * torch.linspace(-1.0, 1.0, len(ids), dtype=torch.float64)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def draw(seed: int = 0) -> tuple[Tensor, torch.nn.Parameter, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, SIZE, generator=generator)
    weight = torch.nn.Parameter(torch.randn(ROWS, SIZE, generator=generator))
    return hidden, weight, torch.randint(0, ROWS, (TOKENS,), generator=generator)


def with_main_grad(weight: torch.nn.Parameter, dtype: torch.dtype = torch.float32) -> Any:
    weight.main_grad = torch.zeros(weight.shape, dtype=dtype)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    return weight


def test_micro_batches_add_up_in_main_grad() -> None:
    hidden, weight, ids = draw()
    held = with_main_grad(weight)
    for _ in range(3):
        logprob_sum(hidden, held, ids).backward()
    expected = 3 * plain_gradient(hidden, weight, ids)
    torch.testing.assert_close(held.main_grad.double(), expected, rtol=1e-5, atol=1e-6)
    assert held.grad_added_to_main_grad is True
    assert torch.equal(held.grad, torch.zeros(ROWS, SIZE))


def test_bfloat16_weights_keep_small_gradients() -> None:
    """128 micro-batches: float32 sums keep what a bfloat16 sum stops seeing."""
    hidden, weight, ids = draw()
    held = with_main_grad(torch.nn.Parameter(weight.detach().bfloat16()))
    plain = torch.nn.Parameter(held.detach().clone())
    for _ in range(128):
        logprob_sum(hidden.bfloat16(), held, ids).backward()
        logprob_sum(hidden.bfloat16(), plain, ids).backward()
    expected = 128 * plain_gradient(hidden.bfloat16(), held, ids)
    scale = expected.abs().max()
    assert plain.grad is not None
    assert (held.main_grad - expected).abs().max() < 1e-5 * scale
    assert (plain.grad - expected).abs().max() > 1e-2 * scale


def test_padding_rows_of_main_grad_are_not_touched() -> None:
    hidden, weight, ids = draw()
    held = with_main_grad(weight)
    held.main_grad.fill_(7.0)
    logprob_sum(hidden, held, ids.clamp(max=7), valid_vocab=8).backward()
    assert (held.main_grad[8:] == 7.0).all()
    assert (held.main_grad[:8] != 7.0).all()


def test_main_grad_of_low_precision_is_refused() -> None:
    hidden, weight, ids = draw()
    loss = logprob_sum(hidden, with_main_grad(weight, torch.bfloat16), ids)
    with pytest.raises(ValueError, match="bfloat16; expected torch.float32"):
        loss.backward()


def test_gradient_of_hidden_alone_leaves_main_grad() -> None:
    hidden, weight, ids = draw()
    held = with_main_grad(weight)
    held.requires_grad_(False)
    hidden.requires_grad_()
    logprob_sum(hidden, held, ids).backward()
    assert hidden.grad is not None
    assert (held.main_grad == 0).all()
    assert held.grad_added_to_main_grad is False


class TinyModel(torch.nn.Module):
    """An embedding, and an output weight that is the same parameter or another."""

    def __init__(self, *, is_tied: bool) -> None:
        super().__init__()
        _, self.embedding, _ = draw(1)
        self.output = None if is_tied else draw(2)[1]

    def forward(self, ids: Tensor, targets: Tensor, *, is_ours: bool) -> Tensor:
        hidden = torch.nn.functional.embedding(ids, self.embedding)
        weight = self.embedding if self.output is None else self.output
        if is_ours:
            return logprob_sum(hidden, weight, targets)
        logprobs = torch.log_softmax(hidden @ weight.t(), -1)[torch.arange(len(ids)), targets]
        return (logprobs * torch.linspace(-1.0, 1.0, len(ids), dtype=logprobs.dtype)).sum()


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


@pytest.mark.parametrize("is_tied", [False, True])
def test_megatron_data_parallel(megatron: Any, is_tied: bool) -> None:
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
        parallel(ids, targets, is_ours=True).backward()
        plain(ids, targets, is_ours=False).backward()
    for (name, ours), true in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert true.grad is not None
        torch.testing.assert_close(
            ours.main_grad.double(),  # type: ignore[attr-defined]
            true.grad,
            rtol=1e-5,
            atol=1e-6,
            msg=name,
        )
