"""What a rank needs for a moment, beside what stays: in the head, and in the backward of a layer.

The two do not happen at the same time; the larger counts.
"""

from __future__ import annotations

from dapo_hpc.plan.activations import FLOAT32, Passes, ends_bytes, layer_bytes
from dapo_hpc.plan.parameters import Stage, table_elements

CHUNK_TOKENS = 2048
"""dapo_kernels.chunks.CHUNK_TOKENS, which cannot be imported without torch; a test compares."""
TILE = 128
ALIGNMENT = 16
CPU_COPIES = 3
"""Tensors of the size of a chunk's logits that the torch reference of the kernels holds at once."""


def chunk_rows(tokens: int) -> int:
    """Tokens in the largest chunk of the head, of as many that all go through it."""
    count = -(-tokens // CHUNK_TOKENS)
    size = -(-tokens // max(count, 1))
    return min(tokens, CHUNK_TOKENS, -(-size // TILE) * TILE)


def logits_bytes(passes: Passes) -> int:
    """Of the logits of a chunk, float32, and of what is made of them at the same time."""
    ranks = passes.learner.tensor_parallel
    columns = passes.architecture.padded_vocab(ranks) // ranks
    rows = chunk_rows(passes.tokens)
    one = rows * (-(-columns // ALIGNMENT) * ALIGNMENT) * FLOAT32
    # While ranks exchange the statistics of a chunk, the logits of the next one are formed.
    buffers = 2 if ranks > 1 and rows < passes.tokens else 1
    if passes.device == "cuda":
        return buffers * one
    return (buffers - 1 + CPU_COPIES) * one


def head_bytes(passes: Passes) -> int:
    """From hidden states to the loss and its gradients: in the forward pass of the last stage.

    The rows that train are gathered, and so is their gradient; then either a chunk's logits are
    there, or the gradient is spread over all rows and handed to the ranks. Afterwards, as the
    backward pass begins, autograd gets zeros in the shape of the output layer's weight.
    """
    is_split = passes.learner.sequence_parallel
    spread = passes.hidden_bytes + passes.local_hidden_bytes * is_split
    forward = 2 * passes.hidden_bytes + max(logits_bytes(passes), spread)
    zeros = table_elements(passes.architecture, passes.learner.tensor_parallel)
    return max(forward, zeros * passes.element_bytes)


def backward_bytes(passes: Passes, stage: Stage) -> int:
    """Of the layer whose backward pass needs most, beside what is kept.

    The gradient of the residual stream, and inside the MLP the larger of two moments: the gradients
    of both factors of the gate, after the kept input of linear_fc2 is gone; before that, the one of
    the input with the weight gradient that is about to be added to the main gradients. With full
    recompute the layer is there anew, with its output. What was kept of the final norm is gone.
    """
    learner, size = passes.learner, passes.architecture
    weight_gradient = size.ffn // learner.tensor_parallel * size.hidden * passes.element_bytes
    gathered = passes.hidden_bytes if learner.sequence_parallel else 0
    mlp = max(2 * passes.ffn_bytes, passes.ffn_bytes + weight_gradient + gathered)
    found = passes.local_hidden_bytes + mlp
    if learner.recompute == "full":
        found += layer_bytes(passes, "none")  # its input is kept already, its output is not
    ends = ends_bytes(passes, is_last=stage.is_last)
    return max(0, found - ends, _embedding_gradient(passes, stage) - ends)


def gathered_bytes(passes: Passes) -> int:
    """The buffer in which Megatron gathers rows under sequence parallelism; it stays."""
    return passes.hidden_bytes if passes.learner.sequence_parallel else 0


def _embedding_gradient(passes: Passes, stage: Stage) -> int:
    """Comes when all else of its micro-batch is gone again."""
    if not stage.is_first:
        return 0
    table = table_elements(passes.architecture, passes.learner.tensor_parallel)
    kept = stage.num_layers * layer_bytes(passes, passes.learner.recompute)
    return table * passes.element_bytes - kept
