"""How others fill a batch, and two oracles: the policies that ours is compared with.

All of them place responses better than any real system does: one queue in dispatch order, and each
free slot of the least loaded engine takes the next response at once.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from .engines import SLOTS, Engines
from .record import Step
from .workload import Draw, Workload


@dataclass(slots=True, eq=False)
class Prompt:
    """A group under way."""

    draw: Draw
    num_left: int


@dataclass
class Central:
    """Engines behind one queue of single responses."""

    workload: Workload
    engines: Engines
    cursor: int = 0
    queue: deque[tuple[Prompt, int]] = field(default_factory=deque)
    _by_load: list[tuple[int, int]] = field(default_factory=list)

    def next_prompt(self) -> Prompt:
        row = self.workload.order.at(self.cursor)[1]
        self.cursor += 1
        return Prompt(self.workload.draw(row), self.workload.group_size)

    def dispatch(self, prompts: Iterable[Prompt]) -> None:
        for prompt in prompts:
            self.queue.extend((prompt, length) for length in prompt.draw.lengths)
        self._fill()

    def _fill(self) -> None:
        """Start queued responses where the fewest are under way."""
        loads = [(len(e.active), i) for i, e in enumerate(self.engines.all) if e.free]
        heapq.heapify(loads)
        changed = set()
        while self.queue and loads:
            load, index = heapq.heappop(loads)
            prompt, length = self.queue.popleft()
            self.engines.all[index].start(prompt, length, self.engines.now)
            changed.add(index)
            if load + 1 < SLOTS:
                heapq.heappush(loads, (load + 1, index))
        for index in changed:
            self.engines.changed(index)

    def step(self) -> Prompt | None:
        """Go on to the next response that ends; the prompt whose last it was, if any."""
        index, prompt = self.engines.pop()
        assert isinstance(prompt, Prompt), "only prompts are dispatched here"
        if self.queue:
            queued, length = self.queue.popleft()
            self.engines.all[index].start(queued, length, self.engines.now)
            self.engines.changed(index)
        prompt.num_left -= 1
        return None if prompt.num_left else prompt

    def end(self) -> None:
        """Give up what is under way."""
        self.queue.clear()
        self.engines.clear()


def rounds(central: Central, num_groups: int, factor: int) -> Step:
    """Generate `factor` times the batch, wait for all of it, filter; repeat while too few.

    Source: verl's DAPO recipe (data.gen_batch_size = 3 * data.train_batch_size), whose script
    repeats whole generation batches until enough groups are informative.
    """
    kept: list[Draw] = []
    dispatched: list[Draw] = []
    while len(kept) < num_groups:
        prompts = [central.next_prompt() for _ in range(factor * num_groups)]
        central.dispatch(prompts)
        num_left = len(prompts)
        while num_left:
            num_left -= central.step() is not None
        dispatched += [prompt.draw for prompt in prompts]
        kept += [prompt.draw for prompt in prompts if prompt.draw.is_informative]
    return Step.of(kept[:num_groups], dispatched)


def first_finished(central: Central, num_groups: int, factor: int) -> Step:
    """Stop when `num_groups` informative groups have finished; give up the rest.

    Source: slime, slime/rollout/sglang_rollout.py: `factor` times the batch (its
    over_sampling_batch_size) is submitted whenever less than a batch is under way or kept.
    """
    kept: list[Draw] = []
    dispatched: list[Draw] = []
    remaining = 0
    while len(kept) < num_groups:
        if remaining < num_groups:
            prompts = [central.next_prompt() for _ in range(factor * num_groups)]
            central.dispatch(prompts)
            dispatched += [prompt.draw for prompt in prompts]
            remaining += len(prompts)
        prompt = central.step()
        if prompt is not None and prompt.draw.is_informative:
            kept.append(prompt.draw)
        elif prompt is not None:
            remaining -= 1
    central.end()
    return Step.of(kept, dispatched)


def oracle(central: Central, num_groups: int, *, is_paying: bool) -> Step:
    """Dispatches at once, in order, the shortest run of prompts with `num_groups` informative ones.

    It ends when these are complete, and waits for no other. Paying: the uninformative prompts in
    between are sampled as well, because nobody can know them before. Otherwise they are left out:
    the limit of any prediction.
    """
    run: list[Prompt] = []
    num_informative = 0
    while num_informative < num_groups:
        run.append(central.next_prompt())
        num_informative += run[-1].draw.is_informative
    central.dispatch(p for p in run if is_paying or p.draw.is_informative)
    while num_informative:
        prompt = central.step()
        num_informative -= prompt is not None and prompt.draw.is_informative
    central.end()
    draws = [prompt.draw for prompt in run]
    return Step.of([draw for draw in draws if draw.is_informative], draws)
