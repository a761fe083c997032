"""The words of the benchmarks: a task, its providers, and the row that comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Results = dict[str, Tensor]
Call = Callable[[], Results]
Row = dict[str, Any]

OURS = "dapo_kernels"


class Absent(Exception):
    """This provider cannot run here; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    tokens: int
    vocab: int = 0
    hidden: int = 0

    def shrunk(self, factor: int) -> Sizes:
        """The same question small, for a machine without GPU. Multiples of 8 stay multiples."""
        if factor == 1:
            return self
        return Sizes(
            tokens=max(16, self.tokens // factor // 8 * 8),
            vocab=max(128, self.vocab // factor // 8 * 8) if self.vocab else 0,
            hidden=max(128, self.hidden // factor // 128 * 128) if self.hidden else 0,
        )

    def named(self) -> dict[str, int]:
        shape = {"tokens": self.tokens, "vocab": self.vocab, "hidden": self.hidden}
        return {name: size for name, size in shape.items() if size}


@dataclass(frozen=True)
class Work:
    """The least a task must do: every input read once, every output written once."""

    bytes: int
    flops: int = 0
    """Of matrix products alone; what else there is hides behind the memory."""


@dataclass(frozen=True, kw_only=True)
class Provider:
    name: str
    bind: Callable[[Any], Call]
    """Inputs to the call that is timed. Imports the peer; raises Absent where it cannot run."""
    note: str = ""
    """What it does less than the task, or differently."""
    destroys_inputs: bool = False
    """The call overwrites its inputs; they are restored outside the timed region."""
    calls: int = 1
    """Calls of the operation within one timed call."""
    work: Work | None = None
    """Where it does not do the whole task."""
    finish: Callable[[Results], Results] | None = None
    """From what the call gives to what can be compared with the truth; not timed."""


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    sizes: Sizes
    work: Callable[[Any], Work]
    """Of inputs: a token without gradient need not be read twice."""
    draw: Callable[[Sizes], Any]
    """Inputs of that size on the device; the same for the same size."""
    truth: Callable[[Any], Results]
    """The results in float64; a provider may give any part of them."""
    providers: tuple[Provider, ...]
    check: Sizes
    """The small shape on which results are compared with the truth."""
    dtype: torch.dtype = torch.bfloat16
    seconds: float = 8.0
    """Time for its launches, at most."""
    launches: int = 40
    is_short: bool = False
    """A call is about as long as its launch: latency from Python is measured as well."""
    counts_kernels: bool = False
    """Also count the kernels of a call, with the profiler; for the last task of a process."""


@dataclass
class Settings:
    """What the command line said."""

    device: torch.device
    shrink: int = 1
    minutes: float = 9.0
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def sizes(self, tokens: int, vocab: int = 0, hidden: int = 0) -> Sizes:
        return Sizes(tokens=tokens, vocab=vocab, hidden=hidden).shrunk(self.shrink)

    def check_sizes(self, vocab: int = 3008, hidden: int = 256) -> Sizes:
        """No multiple of 128 in the vocabulary, as real shards have none."""
        if self.shrink > 1:
            return Sizes(tokens=16, vocab=min(vocab, 504), hidden=min(hidden, 128))
        return Sizes(tokens=128, vocab=vocab, hidden=hidden)

    def takes(self, provider: Provider) -> bool:
        return provider.name not in self.without and (
            not self.only or any(provider.name.startswith(word) for word in self.only)
        )
