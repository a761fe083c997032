"""The output layer, replaced by one that returns log-probs: full-vocabulary logits never exist."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from dapo_kernels import linear_logprob


class LogprobHead(ColumnParallelLinear):  # type: ignore[misc]  # Megatron has no types
    """Megatron's output layer with another forward pass; same parameters, hooks and checkpoints."""

    token_ids: Tensor | None = None
    """[1, T] int64: the token at each place whose log-prob is wanted. Set before each forward."""
    temperature: float = 1.0
    valid_vocab: int = 0
    """Rows of the full weight that are real tokens; the rest pads it to a multiple of TP."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, None]:
        """Hidden [T, 1, H] (a T / TP part under sequence parallelism) -> [T, 1, 2] float32.

        The two are the log-prob (nats, at `temperature`; carries the gradient) and the entropy
        (nats, without gradient).
        """
        if self.token_ids is None or runtime_gather_output is not None:
            raise ValueError("LogprobHead needs token_ids before forward, and gathers nothing.")
        if self.sequence_parallel:
            # The gradient is already summed over the group by linear_logprob.
            input_ = gather_from_sequence_parallel_region(
                input_, tensor_parallel_output_grad=False, group=self.tp_group
            )
        matrix = self.weight if weight is None else weight  # tied embeddings pass theirs
        logprobs, entropy = linear_logprob(
            input_.reshape(-1, input_.shape[-1]),
            matrix,
            self.token_ids.reshape(-1),
            temperature=self.temperature,
            vocab_start=self.tp_group.rank() * matrix.shape[0],
            valid_vocab=self.valid_vocab,
            group=self.tp_group if self.tp_group.size() > 1 else None,
        )
        return torch.stack([logprobs, entropy], dim=-1).unsqueeze(1), None


def install(model: Any, *, temperature: float, valid_vocab: int) -> LogprobHead:
    """Turn the output layer of a GPTModel (last stage) into a LogprobHead, in place."""
    layer = model.output_layer
    layer.__class__ = LogprobHead
    layer.temperature, layer.valid_vocab = temperature, valid_vocab
    return layer  # type: ignore[no-any-return]
