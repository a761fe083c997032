"""Exit codes that tell the launcher not to start a process again, and failures that mean it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

FINAL_EXIT = 3
"""Of a process that need not be started again; 1 may be an accident."""
IDLE_EXIT = 4
"""Of an actor that had no work for long and gives its GPUs back."""


class Final(RuntimeError):
    """A person must act first: what is wrong lies in the config or on disk, not in this process."""


@contextmanager
def refusals_are_final() -> Iterator[None]:
    """A ValueError inside becomes Final. For what looks at nothing but the config and files that no
    process of the run writes; elsewhere a ValueError may come from the moment."""
    try:
        yield
    except ValueError as refusal:
        raise Final(str(refusal)) from refusal
