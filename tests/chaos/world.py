"""One seed, one history: the processes of a run, what befalls them, and the verdict."""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from dapo_hpc.buffer.segments import Segments
from dapo_hpc.buffer.selection import BufferSettings
from tests.buffer_world import SMALL, make_prompts
from tests.chaos import checker
from tests.chaos.actors import Habits, Policy, SimActor
from tests.chaos.buffer_node import BufferNode, Machine
from tests.chaos.disk import FaultKind, Plan, faulty
from tests.chaos.history import History
from tests.chaos.learner import Checkpoints, Course, SimLearner
from tests.chaos.network import Network, Refused, Trouble
from tests.chaos.simulation import Simulation

CALM_LIMIT_S = 3000.0
SEGMENT_BYTES = 16_384
SHM = Path("/dev/shm")

FaultName = Literal[
    "actor killed",
    "actor hung",
    "buffer killed",
    "buffer power failure",
    "buffer fault in a write",
    "buffer hung",
    "buffer replaced while hung",
    "disk full",
    "learner killed",
    "learner hung, another started",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What a seed decides."""

    settings: BufferSettings
    num_prompts: int
    num_actors: int
    policy: Policy
    habits: Habits
    course: Course
    checkpoint_every: int
    trouble: Trouble
    fault_gaps_s: dict[FaultName, float]
    """Mean seconds between two faults of a kind; a kind that is not named does not happen."""
    trouble_s: float
    """After this the world is calm."""
    segment_bytes: int = SEGMENT_BYTES
    check_every: int = 8
    stuck_s: float = CALM_LIMIT_S
    """Virtual seconds without a trained step, after which the run counts as stuck."""


def draw_scenario(seed: int) -> Scenario:
    """A small run with many faults."""
    draw = random.Random(f"scenario {seed}")
    total_steps = draw.randint(4, 7)
    settings = replace(
        SMALL,
        total_steps=total_steps,
        prompts_per_step=draw.randint(2, 3),
        group_size=draw.randint(2, 3),
        dynamic_sampling=draw.random() < 0.7,
        max_staleness=draw.choice([0, 0, 1, 2]),
        lease_s=draw.choice([5.0, 8.0]),
        max_attempts=draw.choice([2, 3, 50]),
        eval_samples=2,
    )
    gaps: dict[FaultName, float] = {
        "actor killed": draw.choice([4.0, 12.0]),
        "actor hung": draw.choice([4.0, 15.0]),
        "buffer killed": draw.choice([20.0, 60.0]),
        "buffer power failure": draw.choice([30.0, 60.0]),
        "buffer fault in a write": draw.choice([8.0, 20.0]),
        "buffer hung": draw.choice([30.0, 90.0]),
        "buffer replaced while hung": draw.choice([20.0, 60.0]),
        "disk full": draw.choice([20.0, 60.0]),
        "learner killed": draw.choice([12.0, 40.0]),
        "learner hung, another started": draw.choice([20.0, 60.0]),
    }
    return Scenario(
        settings=settings,
        num_prompts=draw.choice([4, 30]),
        num_actors=draw.randint(2, 4),
        policy=Policy(),
        habits=Habits(drain=draw.choice([0.0, 0.02]), fail=draw.choice([0.0, 0.02])),
        course=Course(total_steps=total_steps, evaluate_every=draw.choice([0, 2])),
        checkpoint_every=draw.randint(1, 2),
        trouble=Trouble(
            drop=draw.choice([0.0, 0.05, 0.15]),
            duplicate=draw.choice([0.0, 0.05, 0.2]),
            hold_up=draw.choice([0.0, 0.02, 0.1]),
        ),
        fault_gaps_s=gaps,
        trouble_s=draw.uniform(20.0, 60.0),
    )


def long_scenario(num_groups: int) -> Scenario:
    """Short responses, many of them, and every kind of fault all the way through."""
    prompts_per_step = 64
    total_steps = max(1, num_groups // prompts_per_step)
    settings = replace(
        SMALL,
        total_steps=total_steps,
        prompts_per_step=prompts_per_step,
        dynamic_sampling=False,
        max_staleness=1,
        lease_s=8.0,
        max_attempts=1000,
    )
    gaps: dict[FaultName, float] = {
        "actor killed": 20.0,
        "actor hung": 40.0,
        "buffer killed": 120.0,
        "buffer power failure": 120.0,
        "buffer fault in a write": 60.0,
        "buffer hung": 120.0,
        "buffer replaced while hung": 120.0,
        "disk full": 120.0,
        "learner killed": 120.0,
        "learner hung, another started": 240.0,
    }
    return Scenario(
        settings=settings,
        num_prompts=500,
        num_actors=4,
        policy=Policy(mean_short=5.0, mean_long=20.0),
        habits=Habits(max_responses=128, drain=0.001, fail=0.001),
        course=Course(total_steps=total_steps, train_s=0.2, poll_s=0.3),
        checkpoint_every=4,
        trouble=Trouble(drop=0.01, duplicate=0.01, hold_up=0.005),
        fault_gaps_s=gaps,
        trouble_s=float("inf"),
        segment_bytes=2**20,
        check_every=200,
        stuck_s=600.0,
    )


@dataclass
class Verdict:
    seed: int
    problems: list[str]
    counts: Counter[str]
    faults: Counter[str]
    virtual_s: float
    wall_s: float
    history: History


class World:
    """The processes of one run and what befalls them."""

    def __init__(self, seed: int, scenario: Scenario, directory: Path) -> None:
        self.seed = seed
        self.scenario = scenario
        self.sim = Simulation(seed)
        self.network = Network(self.sim, scenario.trouble)
        settings = scenario.settings
        self.history = History(
            settings.max_staleness, settings.group_size, settings.dynamic_sampling
        )
        self.machine = Machine(
            sim=self.sim,
            network=self.network,
            directory=directory / "buffer",
            settings=settings,
            prompts=make_prompts(scenario.num_prompts, seed=seed),
            problems=self.history.problems,
            counts=self.history.counts,
            check_every=scenario.check_every,
        )
        self.faults: Counter[str] = Counter()
        self.actors: list[SimActor] = []
        self.nodes: list[BufferNode] = []
        self.checkpoints = Checkpoints(scenario.checkpoint_every)
        self.learners: list[SimLearner] = []
        self._num_actors = 0
        self._is_calm = False
        self._num_trained = 0
        self._progress_s = self.sim.now

    def run(self) -> None:
        """Until the learner is done. What is wrong is in `history.problems`."""
        with faulty(lambda: self.machine.active):
            self._start()
            try:
                self.sim.run_while(lambda: not (self._is_complete or self._is_stuck()))
            except Refused as error:
                self.history.problems.append(f"refused: {error}")
            for node in self.nodes:
                node.crash(has_power=False)
        self.history.problems += self._check()

    @property
    def _is_complete(self) -> bool:
        return self.learners[-1].is_complete

    def _is_stuck(self) -> bool:
        trained = len(self.history.batches) + self.history.num_released
        if trained > self._num_trained or self.history.problems:
            self._num_trained, self._progress_s = trained, self.sim.now
        elif self.sim.now > self._progress_s + self.scenario.stuck_s:
            self.history.problems.append(f"stuck: at step {self.learners[-1].step}.")
            return True
        return False

    def _check(self) -> list[str]:
        ledgers = self.machine.directory.glob("ledger.*")
        newest = max(ledgers, key=lambda path: int(path.suffix[1:]), default=None)
        return [] if newest is None else checker.check(self.history, newest)

    def _start(self) -> None:
        self._start_buffer(is_alone=True)
        for _ in range(self.scenario.num_actors):
            self._start_actor()
        self._start_learner()
        self.sim.after(self.scenario.trouble_s, self._calm_down)
        for name in self.scenario.fault_gaps_s:
            self._expect(name)
        self.sim.after(1.0, self._supervise)

    # what launchers do

    def _start_actor(self) -> None:
        self._num_actors += 1
        name = f"actor-{self._num_actors}"
        parts = (self.sim, self.network, self.history, self.scenario.policy, self.scenario.habits)
        actor = SimActor(name, *parts)
        self.actors.append(actor)
        actor.start()

    def _start_buffer(self, *, is_alone: bool) -> None:
        self.nodes = [node for node in self.nodes if not node.is_dead]
        self.nodes.append(BufferNode(self.machine, is_alone=is_alone))

    def _start_learner(self) -> None:
        retained = self.checkpoints.retained
        learner = SimLearner(
            sim=self.sim,
            network=self.network,
            history=self.history,
            checkpoints=self.checkpoints,
            course=self.scenario.course,
            start_step=retained[0] if self.sim.random.random() < 0.3 else retained[-1],
            is_current=lambda learner: learner is self.learners[-1],
            on_end=self._learner_ended,
        )
        self.learners = [*self.learners[-1:], learner]
        learner.start()

    def _learner_ended(self, learner: SimLearner) -> None:
        if learner is self.learners[-1]:
            self.sim.after(1.0, self._start_learner)

    def _supervise(self) -> None:
        """Restart what is dead."""
        if all(node.is_dead for node in self.nodes):
            self._start_buffer(is_alone=True)
        dead = [actor for actor in self.actors if actor.life.is_dead]
        self.actors = [actor for actor in self.actors if not actor.life.is_dead]
        for _ in dead:
            self.sim.after(self.sim.random.uniform(0.1, 3.0), self._start_actor)
        if self.learners[-1].life.is_dead:
            self._start_learner()
        self.sim.after(1.0, self._supervise)

    # what befalls them

    def _expect(self, name: FaultName) -> None:
        gap_s = self.sim.random.expovariate(1 / self.scenario.fault_gaps_s[name])
        self.sim.after(gap_s, lambda: self._befall(name))

    def _befall(self, name: FaultName) -> None:
        if self._is_calm:
            return
        self.faults[name] += 1
        match name:
            case "actor killed" if self.actors:
                self.sim.random.choice(self.actors).life.is_dead = True
            case "actor hung" if self.actors:
                actor = self.sim.random.choice(self.actors)
                actor.life.stopped_until = self.sim.now + self.sim.random.uniform(1.0, 20.0)
            case "learner killed":
                self.learners[-1].life.is_dead = True
            case "learner hung, another started":
                life = self.learners[-1].life
                life.stopped_until = self.sim.now + self.sim.random.uniform(1.0, 20.0)
                self._start_learner()
            case _:
                self._befall_buffer(name, self.nodes[-1])
        self._expect(name)

    def _befall_buffer(self, name: FaultName, node: BufferNode) -> None:
        draw = self.sim.random
        match name:
            case "buffer killed":
                node.crash()
            case "buffer power failure":
                node.crash(has_power=False)
            case "buffer fault in a write":
                kinds: list[FaultKind] = ["kill", "power", "stop", "stop", "eio"]
                node.disk.plan = Plan(draw.choice(kinds), draw.randint(1, 12))
            case "buffer hung":
                node.stop(draw.uniform(0.5, 8.0))
            case "buffer replaced while hung":
                node.stop(draw.uniform(0.5, 20.0))
                self.sim.after(draw.uniform(0.1, 5.0), lambda: self._start_buffer(is_alone=False))
            case "disk full":
                node.disk.is_full = True
                self.sim.after(draw.uniform(0.5, 10.0), lambda: _free(node))

    def _calm_down(self) -> None:
        self._is_calm = True
        self.network.trouble = Trouble()
        for node in self.nodes:
            node.disk.plan, node.disk.is_full = None, False
            node.go_on()
        for life in [x.life for x in (*self.actors, *self.learners)]:
            life.stopped_until = 0.0


def _free(node: BufferNode) -> None:
    node.disk.is_full = False


def run_seed(
    seed: int,
    scenario: Scenario | None = None,
    on_commit: Callable[[History, Path], None] | None = None,
    *,
    is_sampled: bool = False,
) -> Verdict:
    """Run one world from its seed; the same seed gives the same history.

    `on_commit` is called with the notes so far and the buffer's directory; with `is_sampled` the
    tokens that were trained are kept.
    """
    with directory_in_memory() as directory:
        return _run(World(seed, scenario or draw_scenario(seed), directory), on_commit, is_sampled)


@contextmanager
def directory_in_memory() -> Iterator[Path]:
    """A temporary one, where syncing costs nothing: the fake disk decides what a crash takes."""
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=SHM if SHM.is_dir() else None) as path:
        yield Path(path)


def _run(
    world: World, on_commit: Callable[[History, Path], None] | None, is_sampled: bool
) -> Verdict:
    began = time.perf_counter()
    if is_sampled:
        world.history.samples = []
    if on_commit is not None:
        world.history.on_commit = partial(on_commit, world.history, world.machine.directory)
    default = Segments.__init__.__kwdefaults__["segment_bytes"]
    Segments.__init__.__kwdefaults__["segment_bytes"] = world.scenario.segment_bytes
    try:
        world.run()
    finally:
        Segments.__init__.__kwdefaults__["segment_bytes"] = default
    history = world.history
    history.counts["messages"] += world.network.num_messages
    history.counts["messages dropped"] += world.network.num_dropped
    history.counts["messages duplicated"] += world.network.num_duplicated
    return Verdict(
        world.seed,
        list(dict.fromkeys(history.problems)),
        history.counts,
        world.faults,
        world.sim.now - 1000.0,
        time.perf_counter() - began,
        history,
    )
