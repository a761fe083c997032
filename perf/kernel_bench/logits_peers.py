"""Peers that start from logits: log-probs, cross-entropies, and Liger's GRPO loss.

Each function binds the inputs and returns the call that is timed. None of these peers gets an
entropy gradient: DAPO has no entropy bonus.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import eager, peers
from .inputs import SEQUENCES, LogitsInputs
from .task import Absent, Call, Provider, Results

LogprobFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""Logits and ids to log-probs and, where there is one, entropy."""


def forward(function: Callable[[], LogprobFunction]) -> Callable[[LogitsInputs], Call]:
    """Binder of a forward without gradient."""

    def bind(inputs: LogitsInputs) -> Call:
        logprob = function()

        def call() -> Results:
            with torch.no_grad():
                logprobs, entropy = logprob(inputs.logits, inputs.token_ids)
            return _named(logprobs, entropy)

        return call

    return bind


def both(function: Callable[[], LogprobFunction]) -> Callable[[LogitsInputs], Call]:
    """Binder of forward and backward, the upstream gradient given."""

    def bind(inputs: LogitsInputs) -> Call:
        logprob = function()

        def call() -> Results:
            logits = inputs.leaf()
            logprobs, entropy = logprob(logits, inputs.token_ids)
            grad = torch.autograd.grad(logprobs, logits, inputs.upstream.view_as(logprobs))[0]
            return {**_named(logprobs.detach(), entropy), "grad_logits": grad}

        return call

    return bind


def loss_of(function: Callable[[], LogprobFunction]) -> Callable[[LogitsInputs], Call]:
    """Binder of log-probs, the eager loss on top, and backward."""

    def bind(inputs: LogitsInputs) -> Call:
        logprob = function()

        def call() -> Results:
            logits = inputs.leaf()
            logprobs, _ = logprob(logits, inputs.token_ids)
            loss, _ = eager.loss_at(logprobs, inputs.loss)
            return {"loss": loss.detach(), "grad_of_loss": torch.autograd.grad(loss, logits)[0]}

        return call

    return bind


def _named(logprobs: Tensor, entropy: Tensor | None) -> Results:
    results = {"logprobs": logprobs.reshape(-1)}
    if entropy is not None:
        results["entropy"] = entropy.detach()
    return results


# ------------------------------------------------------------------ the peers


def torch_eager() -> LogprobFunction:
    return eager.logprob


@functools.cache
def torch_compiled() -> LogprobFunction:
    peers.need_gpu()
    return torch.compile(eager.logprob, dynamic=False)


def trl() -> LogprobFunction:
    return peers.trl_logprob_entropy().selective_log_softmax_and_entropy


def flash_attn(inplace: bool) -> LogprobFunction:
    cross_entropy = peers.flash_attn_cross_entropy().cross_entropy_loss

    def logprob(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, None]:
        return -cross_entropy(logits, token_ids, inplace_backward=inplace)[0], None

    return logprob


def liger_vocab_parallel() -> LogprobFunction:
    peers.need_triton()
    ops = peers.module("liger_kernel.ops.vocab_parallel_cross_entropy")

    def logprob(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, None]:
        loss = ops.LigerVocabParallelCEFunction.apply(
            logits[:, None], token_ids[:, None], None, -100, 0.0, "pytorch", "global"
        )
        return -loss.squeeze(1), None

    return logprob


def megatron_fused(device: torch.device) -> LogprobFunction:
    cross_entropy = peers.module("megatron.core.fusions.fused_cross_entropy")
    group = peers.one_rank_group("nccl" if device.type == "cuda" else "gloo")

    def logprob(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, None]:
        loss = cross_entropy.fused_vocab_parallel_cross_entropy(
            logits[:, None], token_ids[:, None], group
        )
        return -loss.squeeze(1), None

    return logprob


def quack() -> LogprobFunction:
    peers.need_gpu()
    cross_entropy = peers.module("quack.cross_entropy").cross_entropy

    def logprob(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, None]:
        loss = cross_entropy(logits, token_ids, reduction="none", inplace_backward=True)
        return -loss, None

    return logprob


def liger_grpo(inputs: LogitsInputs) -> Call:
    """Liger's kernel sees sequences and predicts nothing from the last token of each."""
    peers.need_triton()
    grpo = peers.module("liger_kernel.transformers.grpo_loss").triton_grpo_loss
    loss, length = inputs.loss, len(inputs.token_ids) // SEQUENCES
    if SEQUENCES * length != len(inputs.token_ids):
        raise Absent(f"needs tokens in {SEQUENCES} sequences of one length")

    def sequences(values: Tensor) -> Tensor:
        return values.view(SEQUENCES, length)[:, :-1].contiguous()

    importance = (loss.old_logprobs - loss.rollout_logprobs).exp().clamp(max=eager.IMPORTANCE_CAP)
    given: dict[str, Any] = {
        "old_logp": sequences(loss.old_logprobs),
        "ref_logp": None,
        "completion_ids": sequences(inputs.token_ids),
        "advantages": loss.advantages.view(SEQUENCES, length)[:, 0].contiguous(),
        "vllm_is_ratio": sequences(importance),
        "temperature": 1.0,
        "beta": 0.0,
        "eps_low": eager.CLIP_LOW,
        "eps_high": eager.CLIP_HIGH,
    }
    weights = sequences(loss.token_weights)

    def call() -> Results:
        logits = inputs.leaf()
        losses, _, _ = grpo(logits.view(SEQUENCES, length, -1), **given)
        total = (losses * weights).sum()
        return {"loss": total.detach(), "grad_of_loss": torch.autograd.grad(total, logits)[0]}

    return call


NO_ENTROPY = "no entropy"


def all_forward(device: torch.device) -> tuple[Provider, ...]:
    return (
        Provider(name="torch eager", bind=forward(torch_eager)),
        Provider(name="torch.compile", bind=forward(torch_compiled)),
        Provider(name="TRL", bind=forward(trl)),
        Provider(
            name="flash-attn", bind=forward(lambda: flash_attn(inplace=False)), note=NO_ENTROPY
        ),
        Provider(name="Liger", bind=forward(liger_vocab_parallel), note=f"{NO_ENTROPY}; one rank"),
        Provider(
            name="Megatron",
            bind=forward(lambda: megatron_fused(device)),
            note=f"{NO_ENTROPY}; one rank",
        ),
        Provider(name="QuACK", bind=forward(quack), note=NO_ENTROPY),
    )


def all_both(device: torch.device) -> tuple[Provider, ...]:
    in_place = f"{NO_ENTROPY}; in place"
    return (
        Provider(name="torch eager", bind=both(torch_eager)),
        Provider(name="torch.compile", bind=both(torch_compiled)),
        Provider(name="TRL", bind=both(trl), note="not in place"),
        Provider(
            name="flash-attn",
            bind=both(lambda: flash_attn(inplace=True)),
            note=in_place,
            destroys_inputs=True,
        ),
        Provider(name="Liger", bind=both(liger_vocab_parallel), note=f"{NO_ENTROPY}; one rank"),
        Provider(
            name="Megatron",
            bind=both(lambda: megatron_fused(device)),
            note=f"{NO_ENTROPY}; one rank",
        ),
        Provider(name="QuACK", bind=both(quack), note=in_place, destroys_inputs=True),
    )


def all_loss() -> tuple[Provider, ...]:
    return (
        Provider(name="torch eager", bind=loss_of(torch_eager)),
        Provider(name="torch.compile", bind=loss_of(torch_compiled)),
        Provider(name="TRL", bind=loss_of(trl), note="and the eager loss"),
        Provider(
            name="Liger GRPO",
            bind=liger_grpo,
            note="no entropy; clip fraction only; 8 tokens fewer",
            destroys_inputs=True,
        ),
    )
