"""Random histories of actors, learners, clocks and crashes, against a model with its own books.

The negative controls plant one bug each in the buffer; the same machine must find every one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dapo_hpc.buffer import book, desk, selection
from dapo_hpc.buffer.desk import LineageFenced
from dapo_hpc.buffer.group import Group, LeaseRecord
from dapo_hpc.buffer.index import Index
from dapo_hpc.records import Lease, PolicyVersion
from tests.buffer_world import World, make_prompts, piece, response

ACTORS = ("a", "b", "c")
LIMITS = settings(
    max_examples=200,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


class BufferMachine(RuleBasedStateMachine):
    """What clients do, and what they know they were promised."""

    @initialize(
        staleness=st.sampled_from([0, 0, 1, 2]),
        on_exhausted=st.sampled_from(["next_pass", "smaller_batch"]),
        is_filtered=st.sampled_from([True, True, False]),
        num_prompts=st.sampled_from([3, 5, 30]),
        is_evaluated=st.booleans(),
        total_steps=st.sampled_from([4, 1000, 1000]),
        closing=st.sampled_from(["dispatch_order", "dispatch_order", "first_finished"]),
    )
    def begin(
        self,
        staleness: int,
        on_exhausted: str,
        is_filtered: bool,
        num_prompts: int,
        is_evaluated: bool,
        total_steps: int,
        closing: str,
    ) -> None:
        self.world = World(
            make_prompts(num_prompts),
            max_staleness=staleness,
            on_exhausted=on_exhausted,
            dynamic_sampling=is_filtered,
            total_steps=total_steps,
            closing=closing,
        )
        self.leases: list[tuple[str, Lease, PolicyVersion]] = []
        self.holder: dict[int, int] = {}
        """Group -> its newest lease."""
        self.acked: dict[tuple[int, int], tuple[int, bool, PolicyVersion]] = {}
        """(group, index) -> (lease, outcome, version) of each acknowledged response."""
        self.tokens: dict[tuple[int, int, int], int] = {}
        """(lease, group, index) -> acknowledged tokens of an unfinished response."""
        self.batches: dict[int, list[int]] = {}
        self.surplus: set[int] = set()
        self.cut: list[int] = []
        """Groups given up as surplus before the batch being filled has closed."""
        self.closed = 1
        """The batch being filled when that was noted."""
        self.trained = 0
        self.held: dict[str, PolicyVersion | None] = dict.fromkeys(ACTORS)
        self.version = self.world.start(is_evaluated=is_evaluated)

    # actors

    @rule(actor=st.sampled_from(ACTORS), free=st.integers(0, 9))
    def lease(self, actor: str, free: int) -> None:
        reply = self.world.ask(actor, self.held[actor], free)
        if reply.newest is not None and not reply.leases:
            self.held[actor] = reply.newest
        assert sum(len(lease.missing) for lease in reply.leases) <= free
        for lease in reply.leases:
            self._note_lease(actor, lease)

    def _note_lease(self, actor: str, lease: Lease) -> None:
        version = self.held[actor]
        assert version is not None, "only an actor with weights gets work"
        assert lease.lease_id > self.holder.get(lease.group_id, 0), "tokens of leases increase"
        for part in lease.missing:
            assert (lease.group_id, part.index) not in self.acked, "a stored response is not lost"
        self.holder[lease.group_id] = lease.lease_id
        self.leases.append((actor, lease, version))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), outcome=st.booleans(), num_tokens=st.integers(1, 9), is_new=st.booleans())
    def submit(self, data: st.DataObject, outcome: bool, num_tokens: int, is_new: bool) -> None:
        actor, lease, version = self._pick(data, is_new)
        part = data.draw(st.sampled_from(lease.missing))
        finished = response(
            part.index, version, is_correct=outcome, num_tokens=num_tokens, prefix=part
        )
        key = (lease.group_id, part.index)
        known = self.acked.get(key)
        try:
            verdict = self.world.submit(lease.lease_id, [finished], actor)[0]
        except ValueError:
            assert known is not None, "only other content for a stored index is refused"
            assert known[0] == lease.lease_id
            return
        is_newest = self.holder[lease.group_id] == lease.lease_id
        is_repeated = known is not None and known[0] == lease.lease_id
        assert is_newest or is_repeated or verdict == "fenced", "only the newest lease may fill"
        if verdict == "stored" and known is None:
            self.acked[key] = (lease.lease_id, outcome, version)

    def _pick(self, data: st.DataObject, is_new: bool) -> tuple[str, Lease, PolicyVersion]:
        candidates = self.leases[-4:] if is_new else self.leases
        return data.draw(st.sampled_from(candidates))

    @rule(actor=st.sampled_from(ACTORS), skip=st.integers(0, 5), is_uniform=st.booleans())
    def work(self, actor: str, skip: int, is_uniform: bool) -> None:
        """An actor loads what it is told, leases, and answers all its leases but one."""
        self.held[actor] = self.world.ask(actor, self.held[actor], 0).newest or self.held[actor]
        self.lease(actor, 100)
        mine = [entry for entry in self.leases if entry[0] == actor]
        for number, (_, lease, version) in enumerate(mine[-8:]):
            if number != skip:
                self._answer(actor, lease, version, is_uniform=is_uniform and number % 2 == 0)

    def _answer(
        self, actor: str, lease: Lease, version: PolicyVersion, *, is_uniform: bool
    ) -> None:
        for part in lease.missing:
            outcome = is_uniform or part.index % 2 == 0
            if (lease.group_id, part.index) not in self.acked:
                done = response(part.index, version, is_correct=outcome, prefix=part)
                if self.world.submit(lease.lease_id, [done], actor) == ["stored"]:
                    key = (lease.group_id, part.index)
                    self.acked[key] = (lease.lease_id, outcome, version)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), num_tokens=st.integers(0, 4), is_new=st.booleans())
    def heartbeat(self, data: st.DataObject, num_tokens: int, is_new: bool) -> None:
        actor, lease, version = self._pick(data, is_new)
        part = data.draw(st.sampled_from(lease.missing))
        key = (lease.lease_id, lease.group_id, part.index)
        offset = self.tokens.get(key, len(part.token_ids))
        pieces = [piece(part.index, offset, num_tokens, version)] if num_tokens else []
        reply = self.world.heartbeat(lease.lease_id, pieces, [offset] * len(pieces), actor)
        is_held = lease.lease_id not in (*reply.lost, *reply.abort)
        if is_held:
            assert self.holder[lease.group_id] == lease.lease_id, "a lost lease is told so"
            self.tokens[key] = offset + num_tokens

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), is_failure=st.booleans())
    def release(self, data: st.DataObject, is_failure: bool) -> None:
        actor, lease, _ = self._pick(data, True)
        self.world.release(lease.lease_id, is_failure=is_failure, actor=actor)

    @rule(seconds=st.floats(0.0, 40.0))
    def wait(self, seconds: float) -> None:
        self.world.tick(seconds)

    # the learner

    @rule(skip=st.sampled_from([99, 99, 0, 2]), is_uniform=st.booleans())
    def whole_step(self, skip: int, is_uniform: bool) -> None:
        """Everybody works until the learner has its batch, if nothing stands in the way."""
        for actor in (*ACTORS, *ACTORS):
            self.work(actor, skip, is_uniform)
        self.take_and_train()

    @rule()
    def take_and_train(self) -> None:
        step = self.trained + 1
        if step > self.world.settings.total_steps:
            return
        reply = self.world.take(step)
        if reply.groups is None:
            assert step not in self.batches, "a batch once taken is there again"
            return
        group_ids = [group.group_id for group in reply.groups]
        assert self.batches.setdefault(step, group_ids) == group_ids, "identical again"
        self.trained = step
        self.version = self.world.publish(step, is_evaluated=step % 3 == 0)

    @precondition(lambda self: self.trained > 0)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        step = data.draw(st.integers(self.world.core.book.state.committed_step, self.trained))
        self.world.commit(step)

    @rule(data=st.data(), is_unlucky=st.sampled_from([False, False, False, False, True]))
    def restart_learner(self, data: st.DataObject, is_unlucky: bool) -> None:
        if not is_unlucky:
            return
        state = self.world.core.book.state
        old = state.lineage
        step = data.draw(st.integers(state.committed_step, self.trained))
        self.version = self.world.start(step)
        self.trained = step
        with pytest.raises(LineageFenced):
            self.world.take(step, lineage=old)

    @rule()
    def crash(self) -> None:
        """The disk alone gives back the state, byte for byte."""
        before, num_new = self.world.core.book.snapshot(), self.world.core.desk.num_new()
        self.world.crash()
        assert self.world.core.book.snapshot() == before
        assert self.world.core.desk.num_new() == num_new

    @rule()
    def crash_from_snapshot(self) -> None:
        before = self.world.core.book.snapshot()
        reopened = book.Book.from_snapshot(before)
        assert reopened.snapshot() == before
        assert list(reopened.index.live) == list(self.world.core.book.index.live)
        assert reopened.index.waiting == self.world.core.book.index.waiting

    # what must always hold

    @invariant()
    def the_books_balance(self) -> None:
        if hasattr(self, "world"):
            assert self.world.core.check() == []

    @invariant()
    def nothing_acknowledged_is_lost(self) -> None:
        """I1, from the clients' own notes: what is stored has its owner, outcome and payload."""
        groups = self.world.core.book.state.groups if hasattr(self, "world") else {}
        for (group_id, index), (lease_id, outcome, _) in self.acked.items() if groups else ():
            group = groups.get(group_id)
            if group is not None and group.state in ("open", "ready", "taken"):
                stored = group.responses[index]
                assert (stored.lease_id, stored.is_correct) == (lease_id, outcome)
                assert stored.record_id is None or stored.record_id in self.world.records

    @invariant()
    def batches_are_what_they_should_be(self) -> None:
        """I2, I3, I5 and the order, recomputed from the clients' notes."""
        if not hasattr(self, "world"):
            return
        state, limits = self.world.core.book.state, self.world.settings
        taken: set[int] = set()
        for step, batch in state.batches.items():
            assert not taken.intersection(batch.group_ids), "trained once"
            taken.update(batch.group_ids)
            assert batch.group_ids == sorted(batch.group_ids), "in dispatch order"
            if not batch.is_short:
                assert len(batch.group_ids) == limits.prompts_per_step
            for group_id in batch.group_ids:
                noted = [self.acked[group_id, index] for index in range(limits.group_size)]
                outcomes = {outcome for _, outcome, _ in noted}
                assert len(outcomes) == 2 or not limits.dynamic_sampling
                oldest = min(version.step for _, _, version in noted)
                assert oldest >= step - 1 - limits.max_staleness
        if limits.closing == "dispatch_order":
            self._assert_nobody_was_overtaken(max(taken, default=0))

    def _assert_nobody_was_overtaken(self, last: int) -> None:
        """What is still to be trained, or was just given up as surplus, lies behind the cut."""
        groups = self.world.core.book.state.groups
        surplus = {k for k, group in groups.items() if group.state == "surplus"}
        for group_id in {*self.world.core.book.index.live, *(surplus - self.surplus)}:
            assert group_id > last, f"group {group_id} was overtaken by {last}"
        self._assert_nothing_needed_was_cut(sorted(surplus - self.surplus), last)
        self.surplus |= surplus

    def _assert_nothing_needed_was_cut(self, surplus: list[int], last: int) -> None:
        """What is given up before the batch closes lies behind the batch that then closes, unless a
        group that counted was parked or quarantined in between."""
        state = self.world.core.book.state
        counted = state.counters.get("train_parked", 0), state.counters.get("train_quarantined", 0)
        if counted != getattr(self, "counted", counted):
            self.cut = []
        self.counted = counted
        if state.current_step != self.closed:
            assert min(self.cut, default=last + 1) > last, f"{self.cut} were cut before {last}"
            self.closed, self.cut = state.current_step, []
        else:
            self.cut += surplus

    @invariant()
    def the_indices_are_a_recount(self) -> None:
        """What the forecast and the early cut go by, counted anew from the groups."""
        if not hasattr(self, "world"):
            return
        kept = self.world.core.book.index
        counted = book.Book(self.world.core.book.state).index
        assert kept.certain == counted.certain
        assert kept.tally.mixed == counted.tally.mixed
        assert +kept.tally.alike == +counted.tally.alike

    @invariant()
    def memory_is_bounded(self) -> None:
        """I11: the number of groups that are ready or under way has a bound."""
        if hasattr(self, "world"):
            limits = self.world.settings
            capacity = (limits.max_staleness + 1) * limits.prompts_per_step
            assert len(self.world.core.book.index.live) <= capacity * 12 + 4


def run(machine: type[RuleBasedStateMachine], limits: settings = LIMITS) -> None:
    run_state_machine_as_test(machine, settings=limits)


def test_random_histories_keep_every_promise() -> None:
    run(BufferMachine)


def _accept_any_lease(_: desk.Desk, __: LeaseRecord, group: Group) -> bool:
    return group.state == "open"


def _first_to_finish(live: Iterable[Group], num_groups: int, _: Any) -> list[Group] | None:
    ready = [group for group in live if group.state == "ready"][:num_groups]
    return ready if len(ready) == num_groups else None


def _forget_the_prompt(self: desk.Desk, group: Group, state: Any) -> None:
    lease = self.live_lease(group)
    if lease is not None:
        self.end_lease(lease, "aborted")
    self.emit(desk.ev.GroupDropped(group_id=group.group_id, state=state, is_returned=False))


def _count_without_event(self: desk.Desk, lease: LeaseRecord, cause: Any) -> None:
    self.book.apply(desk.ev.LeaseEnded(lease_id=lease.lease_id, cause=cause))
    self.forget_deadline(lease)


def _one_too_early(self: Index, group: Group) -> None:
    """Counts on every group that is not uniform so far, also on those of one outcome."""
    if group.kind == "train" and group.state in ("open", "ready") and group.responses:
        self.certain = sorted({*self.certain, group.group_id})
    elif group.group_id in self.certain:
        self.certain.remove(group.group_id)


def _never_too_old(_: Any, __: int) -> int:
    return -1


PLANTED: dict[str, tuple[object, str, Callable[..., Any]]] = {
    "a fenced lease may still fill an index": (desk.Desk, "may_fill", _accept_any_lease),
    "a batch is the first groups to finish": (selection, "closable_batch", _first_to_finish),
    "a dropped group's prompt is forgotten": (desk.Desk, "drop_group", _forget_the_prompt),
    "a change that is not in the ledger": (desk.Desk, "end_lease", _count_without_event),
    "a group counts as informative too early": (Index, "note_certain", _one_too_early),
    "staleness is not checked": (selection, "oldest_step", _never_too_old),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong = PLANTED[bug]
    monkeypatch.setattr(owner, name, wrong)
    limits = settings(LIMITS, max_examples=400, phases=[Phase.generate], print_blob=False)
    with pytest.raises((AssertionError, ExceptionGroup)):
        run(BufferMachine, limits)
