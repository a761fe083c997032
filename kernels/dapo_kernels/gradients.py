"""Where the gradients of hidden and weight are gathered, and who sums them over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_kernels import checks
from dapo_kernels.vocab import VocabShard


def multiply(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right, summed in float32 whatever the operands are."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        # Products of bfloat16, sums and result float32, without a float32 copy of the operands.
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in the dtype of total."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


class HiddenGradient:
    """[K, H] in the dtype of hidden, written chunk by chunk; see `hidden_grad` for the sum."""

    def __init__(
        self,
        hidden: Tensor,
        shard: VocabShard,
        contract: str,
        rows: Tensor | None,
        num_tokens: int,
    ) -> None:
        self._grad = torch.empty_like(hidden)
        self._group = None if contract == "partial" else shard.group
        self._num_ranks = shard.num_ranks
        self._is_scattered = contract == "reduce_scatter"
        self._rows, self._num_tokens = rows, num_tokens
        self._works: list[dist.Work] = []

    def write(self, chunk: slice, grad_logits: Tensor, weight: Tensor) -> None:
        """Each chunk once. The sum over ranks goes on while the caller does something else."""
        multiply(self._grad[chunk], grad_logits, weight)
        if self._group is not None and not self._is_scattered:
            work = dist.all_reduce(self._grad[chunk], group=self._group, async_op=True)
            self._works.append(work)

    def finish(self) -> Tensor:
        """[T, H]; under "reduce_scatter" [T / R, H]."""
        for work in self._works:
            work.wait()
        grad = self._grad
        if self._rows is not None:
            grad = grad.new_zeros((self._num_tokens, grad.shape[1]))
            grad.index_copy_(0, self._rows, self._grad)
        if self._group is None or not self._is_scattered:
            return grad
        part = grad.new_empty((self._num_tokens // self._num_ranks, grad.shape[1]))
        if self._num_tokens:
            dist.reduce_scatter_tensor(part, grad, group=self._group)
        return part


class WeightGradient:
    """[V_local, H], summed over the chunks in float32: in weight.main_grad itself if it exists."""

    def __init__(self, weight: Tensor, main_grad: Tensor | None) -> None:
        exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if main_grad is not None and main_grad.dtype != exact:
            raise ValueError(
                f"weight.main_grad is {main_grad.dtype}; expected {exact}, so that small gradients "
                "are not lost. Set grad_reduce_in_fp32 in Megatron's "
                "DistributedDataParallelConfig."
            )
        self._weight, self._main_grad = weight, main_grad
        self._total = torch.zeros_like(weight, dtype=exact) if main_grad is None else main_grad

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        add_product(self._total, grad_logits.t(), hidden)

    def require_one(self, upstream: Tensor, *, nobody_else: bool) -> Tensor:
        """The upstream gradient, which must be 1 if main_grad has been written already.

        Raises ValueError on a CPU; on a GPU, where looking would wait, another one becomes NaN,
        in main_grad as well if nobody else (no gradient of hidden) would show it.
        """
        if self._main_grad is None:
            return upstream
        if checks.looks_at_values(upstream) and float(upstream) != 1.0:
            raise ValueError(
                f"linear_dapo_loss: the upstream gradient is {float(upstream)}, expected 1: "
                "weight.main_grad was written in the forward. Put the factor into token_weights, "
                "and let nothing scale the loss."
            )
        one = torch.where(upstream == 1.0, 1.0, torch.nan)
        if nobody_else:
            self._main_grad.mul_(one)
        return one

    def finish(self, upstream: Tensor | None = None) -> Tensor:
        """What autograd gets: zeros if main_grad has the gradient."""
        if self._main_grad is None:
            total = self._total if upstream is None else self._total.mul_(upstream)
            return total.to(self._weight.dtype)
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # for its DDP
        return torch.zeros_like(self._weight)
