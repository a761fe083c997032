"""The bytes and matrix FLOPs that each task needs at the least.

Letters: T tokens, V vocabulary on this rank, H hidden, K rows that take part. An id has 8 bytes,
a statistic or weight of a token 4, a logit or parameter `item` bytes (2 for bfloat16).
"""

from __future__ import annotations

from .task import Sizes, Work

ID = 8
FLOAT = 4


def logprob_forward(sizes: Sizes, item: int = 2) -> Work:
    """Logits and ids read; log-prob and entropy written."""
    return Work(sizes.tokens * (sizes.vocab * item + ID + 2 * FLOAT))


def logprob_backward(sizes: Sizes, item: int = 2) -> Work:
    """Logits, ids and the upstream gradient read; the gradient of the logits written."""
    return Work(sizes.tokens * (2 * sizes.vocab * item + ID + FLOAT))


def logprob_both(sizes: Sizes, item: int = 2, kept: float = 1.0) -> Work:
    """Forward and backward apart: logits read twice and written once.

    Rows that are left out (the fraction 1 - kept) are not read; their gradient is written.
    """
    rows = Sizes(tokens=round(sizes.tokens * kept), vocab=sizes.vocab)
    out = (sizes.tokens - rows.tokens) * sizes.vocab * item
    return Work(logprob_forward(rows, item).bytes + logprob_backward(rows, item).bytes + out)


def loss_of_logits(sizes: Sizes, item: int = 2, moving: float = 1.0) -> Work:
    """As logprob_both, and old, rollout, advantage and weight of each token read.

    Rows without gradient (the fraction 1 - moving) are not read a second time.
    """
    still = sizes.tokens - round(sizes.tokens * moving)
    saved = still * sizes.vocab * item
    return Work(logprob_both(sizes, item).bytes + 4 * FLOAT * sizes.tokens - saved)


def scoring(sizes: Sizes, item: int = 2) -> Work:
    """Log-probs from hidden states without gradient: 2THV; hidden, weight and ids read."""
    tokens, vocab, hidden = sizes.tokens, sizes.vocab, sizes.hidden
    moved = (tokens + vocab) * hidden * item + tokens * (ID + 2 * FLOAT)
    return Work(moved, flops=2 * tokens * vocab * hidden)


def linear_loss(sizes: Sizes, item: int = 2, kept: float = 1.0) -> Work:
    """Loss and gradients from hidden states without recompute: 6KHV.

    Hidden and weight read, the gradient of hidden written, that of the weight added to float32
    (read and written).
    """
    tokens, vocab, hidden = sizes.tokens, sizes.vocab, sizes.hidden
    moved = 2 * tokens * hidden * item + vocab * hidden * (item + 2 * FLOAT)
    moved += tokens * (ID + 4 * FLOAT)
    return Work(moved, flops=6 * round(tokens * kept) * vocab * hidden)


def dapo_loss(sizes: Sizes) -> Work:
    """Log-prob, old, rollout, advantage, weight and entropy read; the gradient written."""
    return Work(7 * FLOAT * sizes.tokens)
