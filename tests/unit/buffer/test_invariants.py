"""Every invariant has a check that runs with the buffer: planted damage shows under its number, in
the metrics of the batch and in the snapshot for `dapo status`; and the tokens add up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from dapo_hpc.buffer import messages as msg
from dapo_hpc.buffer.accounting import INVARIANTS, WASTE, token_counts, token_shares
from dapo_hpc.observe.metrics import METRICS
from dapo_hpc.records import PolicyVersion
from tests.buffer_world import World, make_prompts, piece, response

V0 = PolicyVersion(step=0, lineage=1)


@pytest.fixture
def world() -> World:
    """Two taken batches, one more under way, open and ready groups."""
    world = World(make_prompts(40), max_staleness=1)
    world.start()
    for step in (1, 2):
        world.fill(step)
        world.publish(step)
    world.answer(world.lease()[-1])
    assert {group.state for group in world.core.book.index.live.values()} == {"open", "ready"}
    return world


def lose_payload(world: World) -> None:
    group = world.core.book.state.groups[world.core.book.state.batches[1].group_ids[0]]
    world.core.book.freed.append(group.record_ids()[0])


def train_twice(world: World) -> None:
    batches = world.core.book.state.batches
    batches[2].group_ids[0] = batches[1].group_ids[0]


def train_old_tokens(world: World) -> None:
    world.core.book.state.batches[2].min_step = 2


def forget_a_lost_lease(world: World) -> None:
    world.tick(31)
    world.core.book.index.waiting.pop()


def shorten_a_batch(world: World) -> None:
    world.core.book.state.batches[1].group_ids.pop()


def miscount_tokens(world: World) -> None:
    world.core.book.state.counters["tokens_delivered"] += 1


def miscount_responses(world: World) -> None:
    world.core.book.state.counters["responses_leased"] += 1


def miscount_groups(world: World) -> None:
    world.core.book.state.counters["groups_dispatched"] += 1


def change_a_batch(world: World) -> None:
    state = world.core.book.state
    group = state.groups[state.batches[1].group_ids[0]]
    stored = group.responses[0]
    group.responses[0] = type(stored)(
        **{name: getattr(stored, name) for name in stored.__struct_fields__} | {"sha256": b"x" * 32}
    )
    world.take(1)


def overtake(world: World) -> None:
    live = world.core.book.index.live
    live[0] = next(iter(live.values()))


def drop_a_prompt(world: World) -> None:
    world.core.book.state.cursor += 1


def pass_the_gate(world: World) -> None:
    """Done for real in test_security.py; here only that it is shown."""
    world.core.desk.audit.note(["I10: /v1/take was reached past the gate."])


def keep_too_much(world: World) -> None:
    world.core.settings = replace(world.core.settings, prompts_per_step=0)


PLANTED: list[tuple[str, Callable[[World], None]]] = [
    ("I1", lose_payload),
    ("I2", train_twice),
    ("I3", train_old_tokens),
    ("I4", forget_a_lost_lease),
    ("I5", shorten_a_batch),
    ("I6", miscount_tokens),
    ("I6", miscount_responses),
    ("I6", miscount_groups),
    ("I7", change_a_batch),
    ("I8", overtake),
    ("I9", drop_a_prompt),
    ("I10", pass_the_gate),
    ("I11", keep_too_much),
]


@pytest.mark.parametrize(("name", "plant"), PLANTED, ids=lambda x: getattr(x, "__name__", x))
def test_planted_damage_shows_under_its_number(
    world: World, name: str, plant: Callable[[World], None]
) -> None:
    before = world.core.status(world.now)
    assert set(before["invariants_violated"]) == set(INVARIANTS)
    assert not any(before["invariants_violated"].values())
    plant(world)
    after = world.core.status(world.now)
    assert after["invariants_violated"][name] >= 1
    assert after["counters"]["invariant_violations"] >= 1


def test_every_invariant_is_planted_and_is_a_metric() -> None:
    assert {name for name, _ in PLANTED} == set(INVARIANTS)
    assert {f"buffer/{name.lower()}_violations" for name in INVARIANTS} <= set(METRICS)


def test_a_violation_is_remembered_and_reaches_the_metrics_of_the_next_batch() -> None:
    world = World(make_prompts(40))
    world.start()
    assert world.fill(1).metrics["buffer/i6_violations"] == 0
    world.core.book.state.counters["responses_leased"] += 1
    world.core.check()
    world.core.book.state.counters["responses_leased"] -= 1
    assert world.core.check() == []
    world.publish(1)
    metrics = world.fill(2).metrics
    assert metrics["buffer/i6_violations"] == 1
    assert metrics["buffer/invariant_violations"] == 1
    assert all(metrics[f"buffer/{x.lower()}_violations"] == 0 for x in INVARIANTS if x != "I6")


# what became of all tokens


def test_the_tokens_of_a_known_history_add_up() -> None:
    world = World(make_prompts(40))
    version = world.start(is_evaluated=True)
    leases = [x for x in world.ask("a", version).leases if x.kind == "train"]
    evals = [x for x in world.ask("b", version).leases if x.kind == "eval"]
    for lease in evals:
        world.answer(lease, actor="b", num_tokens=11)
    leases += world.lease("a")
    world.answer(leases[0], [True, True], num_tokens=2)
    world.answer(leases[1], [False, False], num_tokens=4)
    lost = leases[2]
    world.heartbeat(lost.lease_id, [piece(0, 0, 6, V0)], [0])
    world.tick(31)
    again = next(x for x in world.lease("c") if x.group_id == lost.group_id)
    assert world.submit(lost.lease_id, [response(1, V0, num_tokens=8)]) == ["fenced"]
    world.answer(again, actor="c", num_tokens=1)
    counts = token_counts(world.core.book)
    assert counts["all_correct"] == 2 * 2
    assert counts["all_wrong"] == 2 * 4
    assert counts["duplicate"] == 8
    assert counts["in_flight"] == (6 + 1) + 1, "a continued response and a whole one"
    assert counts["evaluated"] == sum(len(x.missing) for x in evals) * 11
    delivered = world.core.book.state.counters["tokens_delivered"]
    assert sum(counts.values()) == delivered
    assert world.core.check() == []
    shares = token_shares(world.core.book, 2 * delivered)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["unreported"] == 0.5
    assert shares["duplicate"] == 8 / (2 * delivered)


def test_shares_are_in_the_metrics_and_follow_what_actors_say() -> None:
    world = World(make_prompts(40))
    version = world.start()
    stats = msg.ActorStats(generated_tokens=100, cpu_s=1.0)
    request = msg.LeaseRequest(
        actor="a", version=version, max_responses=100, wait_s=0.0, stats=stats
    )
    leases = world.core.lease(request, world.now, "call").leases
    world.answer(leases[0], [True, True], num_tokens=5)
    for lease in leases[1:3]:
        world.answer(lease, num_tokens=10)
    told = world.take(1).metrics
    shares = {name: told[f"buffer/tokens_{name}_frac"] for name in (*WASTE, "trained", "in_flight")}
    shares["unreported"] = told["buffer/tokens_unreported_frac"]
    assert sum(shares.values()) + told["buffer/tokens_evaluated_frac"] == pytest.approx(1)
    assert shares["all_correct"] == 0.1
    assert shares["in_flight"] == 0.4, "as the batch closes it is not taken yet"
    assert shares["unreported"] == 0.5
    assert world.core.status(world.now)["shares_of_all_tokens"]["trained"] == 0.4


def test_the_last_words_of_an_actor_count() -> None:
    world = World(make_prompts(40))
    world.start()
    lease = world.lease(free=2)[0]
    progress = msg.LeaseProgress(
        lease_id=lease.lease_id, new_tokens=[piece(0, 0, 30, V0)], offsets=[0]
    )
    stats = msg.ActorStats(generated_tokens=40, cpu_s=1.0)
    request = msg.ReleaseRequest(actor="a", leases=[progress], is_failure=False, stats=stats)
    world.core.release(request, world.now)
    shares = world.core.status(world.now)["shares_of_all_tokens"]
    assert (shares["in_flight"], shares["unreported"]) == (0.75, 0.25)
