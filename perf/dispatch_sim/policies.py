"""The policies by name, and a run of consecutive steps of one of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .engines import Engines
from .ours import Fleet
from .peers import Central, first_finished, oracle, rounds
from .record import Step
from .workload import Workload

ORACLE, OURS, REPEAT = "oracle, pays", "ours", ("verl 3x", "verl 1x")
FIRST_FINISHED, STOP_AT_FIRST = "ours, first_finished", "slime 2x"
PEERS: dict[str, Callable[[Central, int], Step]] = {
    ORACLE: partial(oracle, is_paying=True),
    "oracle, knows": partial(oracle, is_paying=False),
    "verl 3x": partial(rounds, factor=3),
    "verl 1x": partial(rounds, factor=1),
    STOP_AT_FIRST: partial(first_finished, factor=2),
}
CLOSINGS = {OURS: "dispatch_order", FIRST_FINISHED: "first_finished"}
POLICIES = (ORACLE, "oracle, knows", OURS, FIRST_FINISHED, *REPEAT, STOP_AT_FIRST)


def run(policy: str, *, num_engines: int, num_groups: int, seed: int, num_steps: int) -> list[Step]:
    """Consecutive rollout steps from the start of a run; all engines are idle between two."""
    workload, engines = Workload(seed), Engines(num_engines)
    if policy in CLOSINGS:
        fleet = Fleet(workload, engines, num_groups, closing=CLOSINGS[policy])
        fill: Callable[[int], Step] = fleet.fill
    else:
        central = Central(workload, engines)

        def fill(_: int) -> Step:
            return PEERS[policy](central, num_groups)

    steps = []
    for step in range(1, num_steps + 1):
        began_s, had = engines.now, engines.tokens
        filled = fill(step)
        steps.append(filled.timed(engines.now - began_s, engines.tokens - had))
    return steps
