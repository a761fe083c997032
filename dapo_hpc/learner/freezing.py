"""learner.freeze applied to a model: what is frozen gets no gradient, moments or update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dapo_hpc.config import Frozen
from dapo_hpc.weights.names import ModelShape


def freeze(module: Any, frozen: Frozen, shape: ModelShape, first_layer: int) -> None:
    """Mark what does not train; before Megatron makes room for gradients.

    Args:
        module: GPTModel of one pipeline stage.
        frozen: what learner.freeze names.
        shape: of the whole model.
        first_layer: global number (from 0) of the stage's layer 0.

    Raises:
        ValueError: the model has no such parameters, or no others.
    """
    problems = frozen.problems(num_layers=shape.num_layers, is_tied=shape.is_tied)
    if problems:
        raise ValueError(" ".join(problems))
    for name, parameter in module.named_parameters():
        is_frozen = frozen.holds(name, first_layer=first_layer, is_tied=shape.is_tied)
        parameter.requires_grad_(not is_frozen)


def let_gradients_start(embedding: torch.nn.Module) -> None:
    """Have the hidden states ask for a gradient although their embedding does not.

    Recomputed layers look only at their input: without one that asks for a gradient, torch runs no
    backward pass through them, and their parameters would silently not train.
    """

    def ask(_module: Any, _inputs: Any, hidden: Tensor) -> None:
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden.requires_grad_()

    embedding.register_forward_hook(ask)
