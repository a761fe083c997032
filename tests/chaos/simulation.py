"""Virtual time: a heap of actions, and generators that sleep or wait for an answer."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

Steps = Generator[Any, Any, Any]
"""Yields seconds to sleep, or an Answer to wait for."""


class Answer:
    """Comes at most once; later ones are ignored."""

    def __init__(self) -> None:
        self._is_there = False
        self._value: Any = None
        self._then: Callable[[Any], None] | None = None

    def give(self, value: Any) -> None:
        if not self._is_there:
            self._is_there, self._value = True, value
            if self._then is not None:
                self._then(value)

    def when_there(self, then: Callable[[Any], None]) -> None:
        if self._is_there:
            then(self._value)
        else:
            self._then = then


@dataclass(eq=False)
class Life:
    """Of one client process: it may end, or stand still for a while without noticing."""

    is_dead: bool = False
    stopped_until: float = 0.0


class Simulation:
    """The only clock and the only randomness."""

    def __init__(self, seed: int) -> None:
        self.now = 1000.0
        self.random = random.Random(seed)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + seconds, self._count, action))

    def run_while(self, is_wanted: Callable[[], bool]) -> None:
        """Let things happen, in order, for as long as anything is left to happen."""
        while self._heap and is_wanted():
            self.now, _, action = heapq.heappop(self._heap)
            action()

    def start(self, life: Life, steps: Steps) -> None:
        """Let a process do its steps until its life ends."""
        self._resume(life, steps, None)

    def _resume(self, life: Life, steps: Steps, value: Any) -> None:
        if life.is_dead:
            steps.close()
            return
        if life.stopped_until > self.now:
            wait_s = life.stopped_until - self.now
            self.after(wait_s, lambda: self._resume(life, steps, value))
            return
        try:
            wish = steps.send(value)
        except StopIteration:
            return
        if isinstance(wish, Answer):
            wish.when_there(lambda given: self._resume(life, steps, given))
        else:
            self.after(wish, lambda: self._resume(life, steps, None))
