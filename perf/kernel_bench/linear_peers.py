"""Peers that start from hidden states.

Those that give log-probs get the slope of the loss as upstream gradient, ready-made: the loss
costs them nothing. Those that know a summed cross-entropy alone are marked so, and are compared
with the truth of that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import eager, peers
from .inputs import LinearInputs
from .task import Call, Provider, Results

LinearFunction = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""Hidden, weight and ids to log-probs and, where there is one, entropy."""

SumFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Hidden, weight and ids to the summed cross-entropy."""

TRL_CHUNK = 32768
"""Columns of a tile; TRL's trainer passes this."""
VERL_CHUNK = 512
"""Tokens of a chunk; verl's default."""


def scoring(function: Callable[[], LinearFunction]) -> Callable[[LinearInputs], Call]:
    """Binder of a forward without gradient."""

    def bind(inputs: LinearInputs) -> Call:
        logprob = function()

        def call() -> Results:
            with torch.no_grad():
                logprobs, entropy = logprob(inputs.hidden, inputs.weight, inputs.token_ids)
            return _named(logprobs, entropy)

        return call

    return bind


def both(function: Callable[[], LinearFunction]) -> Callable[[LinearInputs], Call]:
    """Binder of forward and backward, the slope of the loss given."""

    def bind(inputs: LinearInputs) -> Call:
        logprob = function()

        def call() -> Results:
            hidden = inputs.leaf()
            logprobs, entropy = logprob(hidden, inputs.weight, inputs.token_ids)
            upstream = inputs.upstream.to(logprobs.dtype)
            grads = torch.autograd.grad(logprobs, (hidden, inputs.weight), upstream)
            named = _named(logprobs.detach(), entropy)
            return {**named, "grad_hidden": grads[0], "grad_weight": grads[1]}

        return call

    return bind


def summed(function: Callable[[], SumFunction]) -> Callable[[LinearInputs], Call]:
    """Binder of a summed cross-entropy, forward and backward."""

    def bind(inputs: LinearInputs) -> Call:
        cross_entropy = function()

        def call() -> Results:
            hidden = inputs.leaf()
            total = cross_entropy(hidden, inputs.weight, inputs.token_ids)
            grads = torch.autograd.grad(total, (hidden, inputs.weight))
            return {
                "sum": total.detach(),
                "grad_hidden_of_sum": grads[0],
                "grad_weight_of_sum": grads[1],
            }

        return call

    return bind


def _named(logprobs: Tensor, entropy: Tensor | None) -> Results:
    results = {"logprobs": logprobs}
    if entropy is not None:
        results["entropy"] = entropy.detach()
    return results


# ------------------------------------------------------------------ the peers


def torch_eager() -> LinearFunction:
    return eager.linear_logprob


@functools.cache
def torch_compiled() -> LinearFunction:
    peers.need_gpu()
    return torch.compile(eager.linear_logprob, dynamic=False)


def trl() -> LinearFunction:
    function = peers.trl_chunked_logprob().ChunkedLogProbFunction

    def logprob(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        given = hidden, weight, None, token_ids, 1.0, TRL_CHUNK, None, 1.0, ("entropy",)
        logprobs, entropy, *_ = function.apply(*given)
        return logprobs, entropy

    return logprob


def verl() -> LinearFunction:
    cross_entropy = peers.verl_linear_cross_entropy().linear_cross_entropy

    def logprob(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy(hidden, weight, token_ids, 1.0, "none", None)

    return logprob


def verl_torch() -> LinearFunction:
    function = peers.verl_torch_functional().FusedLinearForPPOFunction

    def logprob(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        return function.apply(hidden, weight, token_ids, 1.0, VERL_CHUNK)

    return logprob


def liger_scaled() -> LinearFunction:
    """On sm_90 Liger's CuTe kernel, which needs QuACK's libraries."""
    function = peers.module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction

    def logprob(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = function.apply(hidden, weight, token_ids, 1.0, -100, 1, True)
        return -nll, entropy

    return logprob


def cut_cross_entropy(filter_eps: str | None) -> LinearFunction:
    peers.need_gpu()
    function = peers.module("cut_cross_entropy").linear_cross_entropy

    def logprob(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, None]:
        nll = function(hidden, weight, token_ids, reduction="none", filter_eps=filter_eps)
        return -nll, None

    return logprob


def liger_flce() -> SumFunction:
    peers.need_triton()
    ops = peers.module("liger_kernel.ops.fused_linear_cross_entropy")

    def cross_entropy(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
        given = hidden, weight, token_ids, None, None, -100, 0.0, 0.0, "sum"
        return ops.LigerFusedLinearCrossEntropyFunction.apply(*given)[0]

    return cross_entropy


def quack() -> SumFunction:
    peers.need_gpu()
    function = peers.module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return functools.partial(function, reduction="sum")


def bare_products(inputs: LinearInputs) -> Call:
    """The three matrix products alone, no softmax: what is left is what the rest costs."""
    hidden, weight = inputs.hidden, inputs.weight.detach()

    def call() -> Results:
        logits = hidden @ weight.t()
        grad_hidden, grad_weight = logits @ weight, logits.t() @ hidden
        del grad_hidden, grad_weight
        return {}

    return call


ALL_AT_ONCE = "all logits in memory"
SUM_ONLY = "summed cross-entropy only: no weights of tokens, no entropy"


def all_both() -> tuple[Provider, ...]:
    exact = both(lambda: cut_cross_entropy(None))
    filtered = both(lambda: cut_cross_entropy("high"))
    return (
        Provider(name="torch eager", bind=both(torch_eager), note=ALL_AT_ONCE),
        Provider(
            name="torch.compile",
            bind=both(torch_compiled),
            note=ALL_AT_ONCE,
        ),
        Provider(name="TRL", bind=both(trl)),
        Provider(name="verl", bind=both(verl)),
        Provider(name="verl torch", bind=both(verl_torch)),
        Provider(name="Liger scaled CE", bind=both(liger_scaled)),
        Provider(name="CCE", bind=filtered, note="no entropy; small gradients left out"),
        Provider(name="CCE exact", bind=exact, note="no entropy"),
        Provider(name="Liger FLCE", bind=summed(liger_flce), note=SUM_ONLY),
        Provider(name="QuACK", bind=summed(quack), note=SUM_ONLY),
        Provider(name="bare products", bind=bare_products, note="the three matmuls, no softmax"),
    )


def all_scoring() -> tuple[Provider, ...]:
    return (
        Provider(name="torch eager", bind=scoring(torch_eager), note=ALL_AT_ONCE),
        Provider(
            name="torch.compile",
            bind=scoring(torch_compiled),
            note=ALL_AT_ONCE,
        ),
        Provider(name="TRL", bind=scoring(trl)),
        Provider(name="verl", bind=scoring(verl)),
        Provider(name="verl torch", bind=scoring(verl_torch)),
        Provider(name="Liger scaled CE", bind=scoring(liger_scaled)),
        Provider(name="CCE", bind=scoring(lambda: cut_cross_entropy(None)), note="no entropy"),
    )
