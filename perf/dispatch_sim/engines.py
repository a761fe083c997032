"""Engines that sample many responses at once, on a virtual clock."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

SLOTS = 256
"""Responses in one engine at a time."""
STEP_S = 0.012
"""Seconds of an engine step whatever it holds."""
STEP_S_PER_RESPONSE = 0.00012
"""Seconds that each response adds to an engine step, which gives each one token."""


@dataclass(slots=True)
class Engine:
    """All active responses advance together, one token in each engine step."""

    name: str
    steps: float = 0.0
    """Engine steps so far: the number of tokens a response gets is a difference of these."""
    at_s: float = 0.0
    tokens: float = 0.0
    active: list[tuple[float, int, Hashable]] = field(default_factory=list)
    """Heap of (step at which it ends, tie-break, response)."""
    _count: int = 0

    @property
    def free(self) -> int:
        return SLOTS - len(self.active)

    def _step_s(self) -> float:
        return STEP_S + STEP_S_PER_RESPONSE * len(self.active)

    def advance(self, now: float) -> None:
        if self.active:
            steps = (now - self.at_s) / self._step_s()
            self.steps += steps
            self.tokens += steps * len(self.active)
        self.at_s = now

    def start(self, response: Hashable, num_tokens: int, now: float) -> None:
        self.advance(now)
        self._count += 1
        heapq.heappush(self.active, (self.steps + num_tokens, self._count, response))

    def drop(self, is_dropped: Callable[[Hashable], bool], now: float) -> None:
        """Stop sampling some responses; what they sampled is paid."""
        self.advance(now)
        self.active = [entry for entry in self.active if not is_dropped(entry[2])]
        heapq.heapify(self.active)

    def next_s(self) -> float:
        """When the next response ends."""
        if not self.active:
            return float("inf")
        return self.at_s + max(0.0, self.active[0][0] - self.steps) * self._step_s()

    def pop(self, now: float) -> Hashable:
        """The response that ends now."""
        self.advance(now)
        return heapq.heappop(self.active)[2]


class Engines:
    """A fleet; finds the next response to end anywhere."""

    def __init__(self, num_engines: int) -> None:
        self.all = [Engine(f"engine-{index}") for index in range(num_engines)]
        self.now = 0.0
        self._next: list[tuple[float, int, int]] = []
        """Heap of (second, engine, stamp); an entry of an old stamp is skipped."""
        self._stamp = [0] * num_engines

    @property
    def tokens(self) -> float:
        """Sampled up to now."""
        for engine in self.all:
            engine.advance(self.now)
        return sum(engine.tokens for engine in self.all)

    def changed(self, index: int) -> None:
        """An engine got or lost responses."""
        self._stamp[index] += 1
        at_s = self.all[index].next_s()
        if at_s < float("inf"):
            heapq.heappush(self._next, (at_s, index, self._stamp[index]))

    def next_s(self) -> float:
        while self._next and self._next[0][2] != self._stamp[self._next[0][1]]:
            heapq.heappop(self._next)
        return self._next[0][0] if self._next else float("inf")

    def pop(self) -> tuple[int, Hashable]:
        """(engine, response) of the next end; the clock moves there."""
        self.now = max(self.now, self.next_s())
        index = self._next[0][1]
        response = self.all[index].pop(self.now)
        self.changed(index)
        return index, response

    def clear(self) -> None:
        """Everything under way is given up."""
        for index, engine in enumerate(self.all):
            engine.drop(lambda _: True, self.now)
            self.changed(index)
