"""What autograd keeps of a forward pass for the backward pass, tensor by tensor.

Read off Megatron's layers with our norm and attention in them (dapo_hpc/learner/attention.py), and
compared with the tensors of real passes in tests/unit/plan. On a GPU two operations keep other
things than on a processor:

    rms_norm    its input and one number a row; on a processor also the normalised rows, in float32
    attention   the variable-length kernel keeps what the CPU's keeps: q, k, v, its output and
                the log of the sum of exp, no scores

Legend: T tokens of a micro-batch, H hidden size, e bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dapo_hpc.config import LearnerSection
from dapo_hpc.plan.architecture import Architecture

Device = Literal["cuda", "cpu"]
Recompute = Literal["none", "selective", "full"]
FLOAT32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """Which forward passes are meant: of what, on what, with how many tokens."""

    architecture: Architecture
    learner: LearnerSection
    element_bytes: int
    device: Device
    tokens: int
    """T: of the largest micro-batch on this rank."""

    @property
    def local_tokens(self) -> int:
        """Rows of norms and residuals: a share under sequence parallelism."""
        ranks = self.learner.tensor_parallel if self.learner.sequence_parallel else 1
        return self.tokens // ranks

    @property
    def hidden_bytes(self) -> int:
        """Of all rows of hidden states."""
        return self.tokens * self.architecture.hidden * self.element_bytes

    @property
    def local_hidden_bytes(self) -> int:
        """Of this rank's rows of hidden states: what stages hand on and residuals add to."""
        return self.local_tokens * self.architecture.hidden * self.element_bytes

    @property
    def ffn_bytes(self) -> int:
        """Of one tensor as wide as this rank's share of the MLP."""
        width = self.architecture.ffn // self.learner.tensor_parallel
        return self.tokens * width * self.element_bytes


def layer_bytes(passes: Passes, recompute: Recompute) -> int:
    """Kept of one decoder layer."""
    if recompute == "full":
        return passes.local_hidden_bytes  # its input
    return sum(layer_tensors(passes, recompute).values())


def layer_tensors(passes: Passes, recompute: Recompute) -> dict[str, int]:
    """Name -> bytes of every tensor kept of a layer that is not recomputed as a whole."""
    norm = _residual_norm_bytes(passes)
    return {
        "input_layernorm": norm,
        "linear_qkv input": passes.local_hidden_bytes,
        **_attention_tensors(passes, recompute),
        "pre_mlp_layernorm": norm,
        "linear_fc1 input": passes.local_hidden_bytes,
        "linear_fc1 output": 2 * passes.ffn_bytes,
        "silu of the gate": passes.ffn_bytes,
        "linear half": passes.ffn_bytes,  # Megatron adds an offset of 0 to it
        "linear_fc2 input": passes.ffn_bytes,
    }


def angle_bytes(passes: Passes) -> int:
    """Kept for all layers together: cos and sin of the rotary embedding, each half as wide as a
    head."""
    return passes.tokens * passes.architecture.head_dim * FLOAT32


def ends_bytes(passes: Passes, *, is_last: bool) -> int:
    """Kept beside the layers: of the final norm, and the gradient that the head hands over."""
    if not is_last:
        return 0
    return _residual_norm_bytes(passes) + passes.local_hidden_bytes


def _attention_tensors(passes: Passes, recompute: Recompute) -> dict[str, int]:
    """Of self-attention without its input. q, k and v are views of one tensor; what is rotated, or
    normalised from a view that is not contiguous, is new."""
    size, ranks, e = passes.architecture, passes.learner.tensor_parallel, passes.element_bytes
    rows = passes.tokens
    heads, kv_heads = size.heads // ranks, size.kv_heads // ranks
    query, key = (rows * n * size.head_dim * e for n in (heads, kv_heads))
    kept = {"q, k, v": query + 2 * key, "attention output": query}
    copied_query = query if kv_heads > 1 else 0
    if size.has_qk_norm:
        kept["q_layernorm"] = _norm_bytes(passes, rows * heads, size.head_dim, copied_query)
        kept["k_layernorm"] = _norm_bytes(passes, rows * kv_heads, size.head_dim, 0)
    if recompute == "selective":
        # Core attention keeps its inputs; with norms on q and k these are new tensors.
        inputs = query + key if size.has_qk_norm else copied_query
        return {**kept, "core attention inputs": inputs}
    rotated = {"rotated q": query, "log-sum-exp": rows * heads * FLOAT32}
    share = passes.learner.context_parallel
    if share == 1:
        return {**kept, **rotated, "rotated k": key}
    # Each chunk's keys and values, of all ranks: see dapo_hpc/learner/context.py.
    return {**kept, **rotated, "gathered k, v": 2 * key * (2 * share + 1) // 2}


def _residual_norm_bytes(passes: Passes) -> int:
    return _norm_bytes(
        passes, passes.local_tokens, passes.architecture.hidden, passes.local_hidden_bytes
    )


def _norm_bytes(passes: Passes, rows: int, width: int, input_bytes: int) -> int:
    """Kept of an RMSNorm: its input, and one over the root mean square of each row; on a processor
    the normalised rows too, and of a bfloat16 input a float32 copy instead."""
    if passes.device == "cuda":
        return input_bytes + rows * FLOAT32
    if passes.element_bytes != FLOAT32:
        input_bytes = rows * width * FLOAT32
    return input_bytes + rows * (1 + width) * FLOAT32
