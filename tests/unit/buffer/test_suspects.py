"""A prompt that kills its actors is parked; prompts whose actors are preempted are not."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_hpc.buffer import messages as msg
from dapo_hpc.buffer import suspects
from dapo_hpc.records import Lease, PolicyVersion
from tests.buffer_world import World, make_prompts, piece

MAX_ATTEMPTS = 3
CONVICTED = suspects.SUSPECT_DEATHS + MAX_ATTEMPTS
"""Deaths in a row after which a prompt is parked."""
V0 = PolicyVersion(step=0, lineage=1)


@dataclass
class Cluster:
    """Actors on a preemptible partition, some prompts deadly to whoever samples them."""

    seed: int
    deadly: frozenset[int] = frozenset()
    """Positions in the order of prompts."""
    preempted_frac: float = 0.0
    """Share of the rounds in which an actor is lost before its first token."""
    num_actors: int = 3
    places: int = 12
    num_prompts: int = 60
    prompts_per_step: int = 12
    deaths: Counter[int] = field(default_factory=Counter)
    """Of actors, by the deadly row they held."""

    def run(self, num_steps: int) -> World:
        draw = random.Random(self.seed)
        self.world = World(
            make_prompts(self.num_prompts),
            prompts_per_step=self.prompts_per_step,
            max_attempts=MAX_ATTEMPTS,
            total_steps=num_steps + 1,
            dynamic_sampling=False,
        )
        self.world.start()
        self.rows = frozenset(self.world.prompts.order.at(place)[1] for place in self.deadly)
        lives = list(range(self.num_actors))
        for step in range(1, num_steps + 1):
            for _ in range(2000):
                if self.world.take(step).groups is not None:
                    break
                for place, life in enumerate(lives):
                    if not self._works(f"actor-{place}-{life}", draw):
                        lives[place] += 1
                self.world.tick(self.world.settings.lease_s / 3)
            else:
                raise AssertionError(f"step {step} never closes: {self.world.notices[-3:]}")
            assert self.world.core.check() == []
            self.world.publish(step)
        return self.world

    def _works(self, actor: str, draw: random.Random) -> bool:
        """One round of an actor; False: it is dead."""
        version = self.world.core.book.state.newest
        assert version is not None
        leases = self.world.ask(actor, version, self.places).leases
        killers = {lease.prompt.row for lease in leases} & self.rows
        self.deaths.update(killers)
        if killers or draw.random() < self.preempted_frac:
            return False
        for lease in leases:
            self._reports(lease, actor, version)
        if draw.random() < self.preempted_frac:
            return False
        for lease in leases:
            self.world.answer(lease, actor=actor, version=version)
        return True

    def _reports(self, lease: Lease, actor: str, version: PolicyVersion) -> None:
        offset = len(lease.missing[0].token_ids)
        new = piece(lease.missing[0].index, offset, 1, version)
        self.world.heartbeat(lease.lease_id, [new], [offset], actor)

    def parked(self) -> set[int]:
        groups = self.world.core.book.state.groups.values()
        return {group.row for group in groups if group.state == "parked"}


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    deadly=st.sets(st.integers(0, 40), min_size=1, max_size=6),
    num_actors=st.integers(1, 5),
)
def test_poison_alone_is_parked_and_after_few_deaths(
    seed: int, deadly: set[int], num_actors: int
) -> None:
    """Without other losses the verdict is exact, whatever company the deadly prompts kept."""
    cluster = Cluster(seed, frozenset(deadly), num_actors=num_actors)
    cluster.run(num_steps=4)
    met = set(cluster.deaths)
    assert cluster.parked() == met == cluster.rows
    assert max(cluster.deaths.values()) <= CONVICTED
    assert sum("it is parked" in notice for notice in cluster.world.notices) == len(met)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), deadly=st.sets(st.integers(0, 40), max_size=3))
def test_poison_is_parked_amid_preemptions_too(seed: int, deadly: set[int]) -> None:
    cluster = Cluster(seed, frozenset(deadly), preempted_frac=0.1)
    cluster.run(num_steps=4)
    assert cluster.parked() >= set(cluster.deaths)
    assert max(cluster.deaths.values(), default=0) <= CONVICTED


@pytest.mark.parametrize(("lost_frac", "num_runs"), [(0.5, 6), (0.1, 3)])
def test_preemption_parks_the_innocent_as_rarely_as_stated(lost_frac: float, num_runs: int) -> None:
    """With p of all leases lost before their first token: at most p^n / (1 - p), n deaths in a row.

    p^n for each time that it starts from none; a lease that is lost behind its first token, here
    with the same p, lets it start again.
    """
    parked = groups = 0
    for seed in range(num_runs):
        counters = Cluster(seed, preempted_frac=lost_frac).run(num_steps=4).core.book.state.counters
        parked += counters.get("train_parked", 0)
        groups += counters["groups_dispatched"]
    bound = lost_frac**CONVICTED / (1 - lost_frac)
    assert groups > 40 * num_runs
    assert parked <= groups * bound + 3 * math.sqrt(groups * bound)
    assert (parked > 0) == (lost_frac == 0.5), "at a half some are: the bound is not idle"


def test_without_trials_the_innocent_go_with_the_guilty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the same count of deaths, in company, parks the company too."""
    monkeypatch.setattr(suspects, "on_trial", lambda *_: None)
    monkeypatch.setattr(suspects, "cleared", lambda groups: groups)
    cluster = Cluster(3, frozenset(range(0, 60, 15)))
    cluster.run(num_steps=4)
    assert len(cluster.parked() - cluster.rows) > 3


# the rule, piece by piece


@pytest.fixture
def world() -> World:
    world = World(make_prompts(20), prompts_per_step=4, max_attempts=MAX_ATTEMPTS)
    world.start()
    return world


def lose_actor(world: World, actor: str) -> list[Lease]:
    """It leases what it gets and is never heard of again."""
    leases = world.lease(actor, free=8)
    world.tick(31)
    return leases


def deaths(world: World) -> dict[int, int]:
    return {group_id: group.deaths for group_id, group in world.core.book.index.live.items()}


def test_a_token_clears(world: World) -> None:
    lost = lose_actor(world, "a")
    assert set(deaths(world).values()) == {1}
    again = world.lease("b", free=8)
    world.heartbeat(again[0].lease_id, [piece(0, 0, 1, V0)], [0], "b")
    world.tick(31)
    assert deaths(world)[lost[0].group_id] == 0
    assert deaths(world)[lost[1].group_id] == 2


def test_a_heartbeat_without_tokens_proves_nothing(world: World) -> None:
    lease = world.lease(free=2)[0]
    world.heartbeat(lease.lease_id)
    world.tick(31)
    assert deaths(world)[lease.group_id] == 1


def test_a_late_response_clears(world: World) -> None:
    lease = world.lease(free=2)[0]
    world.tick(31)
    world.answer(lease)
    assert world.core.book.state.groups[lease.group_id].deaths == 0


def test_a_suspect_is_leased_alone_and_its_actor_gets_more_once_it_is_proven(world: World) -> None:
    for actor in ("a", "b"):
        lost = lose_actor(world, actor)
    assert set(deaths(world).values()) == {2}
    trial = world.lease("c", free=8)
    assert [lease.group_id for lease in trial] == [lost[0].group_id]
    assert world.lease("c", free=8) == []
    world.heartbeat(trial[0].lease_id, [piece(0, 0, 1, V0)], [0], "c")
    assert [lease.group_id for lease in world.lease("c", free=8)] == [lost[1].group_id]


def test_an_actor_that_is_always_refilled_is_kept_free_for_a_suspect(world: World) -> None:
    suspect = lose_actor_of_one(world, "x")
    assert lose_actor_of_one(world, "y", kept_busy="a") == suspect
    assert deaths(world)[suspect] == 2
    assert world.lease("a", free=8) == [], "its lease is not proven yet"
    lease = world.core.desk.live_leases("a")[0]
    world.heartbeat(lease.lease_id, [piece(0, 0, 1, V0)], [0], "a")
    assert [x.group_id for x in world.lease("a", free=8)] == [suspect]


def lose_actor_of_one(world: World, actor: str, kept_busy: str | None = None) -> int:
    """An actor of one lease is lost, another keeps the one it got at the same time."""
    group_id = world.lease(actor, free=2)[0].group_id
    kept = world.lease(kept_busy, free=2)[0].lease_id if kept_busy else None
    for _ in range(4):
        world.tick(8)
        if kept and kept_busy:
            world.heartbeat(kept, actor=kept_busy)
    return group_id


def test_a_suspect_keeps_its_deaths_in_the_next_batch_and_after_a_crash(world: World) -> None:
    for actor in ("a", "b"):
        lost = lose_actor(world, actor)
    for group_id in [lease.group_id for lease in lost]:
        world.core.desk.drop_group(world.core.book.state.groups[group_id], "surplus")
    world.flush()
    world.crash()
    again = world.lease("c", free=8)
    assert {lease.prompt.row for lease in again} == {lease.prompt.row for lease in lost}
    assert set(deaths(world).values()) == {2}


def test_an_engine_that_fails_with_several_leases_accuses_nobody_at_once(world: World) -> None:
    """A prompt that brings the engine down is found like one that kills the process."""
    innocent: set[int] = set()
    for attempt in range(40):
        actor = f"a{attempt}"
        leases = world.lease(actor, free=8)
        if any(lease.prompt.row == deadly_row(world) for lease in leases):
            progress = [
                msg.LeaseProgress(lease_id=x.lease_id, new_tokens=[], offsets=[]) for x in leases
            ]
            request = msg.ReleaseRequest(actor=actor, leases=progress, is_failure=True)
            world.core.release(request, world.now)
            world.flush()
            innocent |= {lease.prompt.row for lease in leases} - {deadly_row(world)}
        else:
            for lease in leases:
                world.answer(lease, actor=actor)
    groups = world.core.book.state.groups.values()
    assert {g.row for g in groups if g.state == "parked"} == {deadly_row(world)}
    assert innocent
    assert world.core.check() == []
    assert world.core.book.state.counters["leases_crashed"] > 0


def deadly_row(world: World) -> int:
    """The second prompt of the order, so that it has company."""
    return world.prompts.order.at(1)[1]
