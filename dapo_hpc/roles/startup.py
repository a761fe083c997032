"""What roles do before their work: start fast, listen to the launcher, keep the log short."""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_start() -> Iterator[None]:
    """No garbage collection while modules are imported and models are built.

    Imports make a million objects and no garbage; looking through them again and again takes a
    quarter of the time. What is there at the end is never looked through again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def without(module: str) -> Iterator[None]:
    """Imports inside find that a module is not installed, unless it is imported already.

    Tokenizers need no torch; importing it takes three of the four seconds they need to start.
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # Python's own sign for "not there"
    try:
        yield
    finally:
        del sys.modules[module]


def leave_when_asked() -> None:
    """Exit 0 at SIGTERM. SIGINT is left to the launcher: an interrupted terminal signals all
    processes at once, and the launcher then asks them in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


def leave_at_once_when_asked() -> None:
    """`leave_when_asked` of a process that has nothing to put away: whatever it is writing is given
    up. Python's own way out would wait for the threads that write, and torch crashes when it is
    torn down beside them."""
    leave_when_asked()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def silence_megatron() -> None:
    """Megatron tells at length which optional libraries it does not find."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.simplefilter("ignore", FutureWarning)
