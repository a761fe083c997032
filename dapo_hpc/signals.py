"""Signals that a whole step of a Slurm job receives, and that children must not die of."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

HANDED_OVER = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}
"""Blocked in the children of a role: the role hears these first, and ends its children itself."""


@contextmanager
def blocked_in_children() -> Iterator[None]:
    """Threads and processes that start meanwhile keep these signals blocked for good. Here they
    arrive when this is over."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_OVER)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
