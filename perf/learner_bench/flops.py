"""The matrix FLOPs that a model needs for a sequence, whatever computes them.

A product of [a, b] and [b, c] is 2 a b c. Letters: L layers, H hidden size, F width of the MLP,
a heads of size d, k key-value heads, V vocabulary, n tokens of a sequence, r of them in its
response.

    layers      2 n L (H a d + 2 H k d + a d H + 3 H F)     query, key and value, output, MLP
    attention   2 L a d n (n + 1)                           scores and values; n (n + 1) / 2 pairs
    head        2 r H V                                     response tokens alone are asked for

Their sum is a forward pass, which is all that scoring needs; a backward pass is two more. What is
computed twice, on padding, or for prompt tokens in the head is not counted, and neither are norms,
rotations, softmax and the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable

from .shapes import Architecture

TRAINING = 3
"""Forward passes that a forward and a backward pass are worth."""


def forward(model: Architecture, tokens: int, response_tokens: int) -> int:
    """One sequence of that many tokens, prompt included."""
    query = model.hidden * model.heads * model.head_size
    key_value = 2 * model.hidden * model.kv_heads * model.head_size
    mlp = 3 * model.hidden * model.ffn
    layers = 2 * tokens * model.layers * (2 * query + key_value + mlp)
    attention = 2 * model.layers * model.heads * model.head_size * tokens * (tokens + 1)
    head = 2 * response_tokens * model.hidden * model.vocab
    return layers + attention + head


def of_batch(model: Architecture, sequences: Iterable[tuple[int, int]]) -> dict[str, int]:
    """Of sequences (prompt tokens, response tokens): `score` and `update`."""
    score = sum(forward(model, prompt + response, response) for prompt, response in sequences)
    return {"score": score, "update": TRAINING * score}
