"""What roles do before their work: start fast, listen to the launcher, keep the log short."""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
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


ASKED = (signal.SIGTERM, signal.SIGUSR2)
"""How a role is asked to leave: by the local launcher or by Slurm, and by the supervisor of its
Slurm job, since srun kills a step when it is sent SIGTERM itself."""


def leave_when_asked() -> None:
    """Exit 0 when asked. SIGINT is left to the launcher: an interrupted terminal signals all
    processes at once, and the launcher then asks them in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    call_when_asked(lambda: sys.exit(0))


def call_when_asked(leave: Callable[[], object]) -> None:
    """What to do when asked to leave."""
    for number in ASKED:
        signal.signal(number, lambda *_: leave())


def leave_at_once_when_asked() -> None:
    """`leave_when_asked` of a process that has nothing to put away: whatever it is writing is given
    up. Python's own way out would wait for the threads that write, and torch crashes when it is
    torn down beside them."""
    leave_when_asked()
    call_when_asked(lambda: os._exit(0))


class Wish:
    """Whether somebody has asked; set by a signal."""

    def __init__(self) -> None:
        self._is_asked = False

    def __call__(self) -> bool:
        return self._is_asked

    def ask(self) -> None:
        self._is_asked = True


def note_when_asked(number: signal.Signals) -> Wish:
    """At this signal go on, and know it."""
    wish = Wish()
    signal.signal(number, lambda *_: wish.ask())
    return wish


def silence_megatron() -> None:
    """Megatron tells at length which optional libraries it does not find."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.simplefilter("ignore", FutureWarning)
