"""The toy policy and verifier. Both are functions of names alone, so that a checker who never saw
a response knows how long and how right it must be."""

from __future__ import annotations

import hashlib

MEAN_TOKENS = 24


def _unit(*names: object) -> float:
    """Uniform in [0, 1), the same wherever it is asked."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64


def num_tokens(group_id: int, index: int) -> int:
    """Geometric-like with a long tail, at least 2."""
    share = _unit("length", group_id, index)
    return 2 + min(int(MEAN_TOKENS * share / (1.05 - share)), 8 * MEAN_TOKENS)


def is_correct(group_id: int, index: int) -> bool:
    """Each prompt has a pass rate of its own; a third of the groups is uniform or nearly so."""
    rate = _unit("rate", group_id)
    return _unit("outcome", group_id, index) < rate
