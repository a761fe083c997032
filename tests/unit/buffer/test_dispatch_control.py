"""How many prompts to begin, who gets them, and what is given up, against enumeration."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from dapo_hpc.buffer import batches, forecast, selection
from dapo_hpc.buffer.forecast import Expected, Outlook, Tally, new_prompts, prior
from dapo_hpc.records import PolicyVersion
from tests.buffer_world import World, make_prompts, response

V0 = PolicyVersion(step=0, lineage=1)


# ------------------------------------------------------------------ the forecast


@pytest.mark.parametrize("group_size", [2, 5, 16])
def test_prior_is_that_of_pass_rates_with_jeffreys_prior(group_size: int) -> None:
    """The integral over pass rates, by their quantiles: sin^2 of an even grid."""
    rates = np.sin((np.arange(200_000) + 0.5) / 200_000 * math.pi / 2) ** 2
    for c, share in enumerate(prior(group_size)):
        likelihood = math.comb(group_size, c) * rates**c * (1 - rates) ** (group_size - c)
        assert share == pytest.approx(likelihood.mean(), rel=1e-6)
    assert sum(prior(group_size)) == pytest.approx(1.0)


def informative_share(weights: Sequence[float], num_alike: int, is_correct: bool) -> float:
    """Truth: go through all orders in which the responses of a past group can have finished."""
    size = len(weights) - 1
    informative = total = 0.0
    for outcomes in itertools.product([False, True], repeat=size):
        num_correct = sum(outcomes)
        weight = weights[num_correct] / math.comb(size, num_correct)
        if all(outcome == is_correct for outcome in outcomes[:num_alike]):
            total += weight
            informative += weight * (0 < num_correct < size)
    return informative / total


@pytest.mark.parametrize("weights", [(5.0, 1.0, 0.5, 2.0, 9.0), (0.1, 3.0, 4.0, 3.0, 0.2)])
def test_chance_of_a_group_is_that_of_past_groups_that_began_like_it(
    weights: tuple[float, ...],
) -> None:
    outlook = Outlook(weights)
    accuracy = sum(c * w for c, w in enumerate(weights)) / (4 * sum(weights))
    wrong = []
    for num_alike, is_correct in itertools.product(range(4), [False, True]):
        truth = informative_share(weights, num_alike, is_correct)
        assert outlook.chance(num_alike, is_correct) == pytest.approx(truth)
        one_rate = accuracy if is_correct else 1 - accuracy
        wrong.append(abs(1 - one_rate ** (4 - num_alike) - truth))
    assert outlook.rate == pytest.approx(informative_share(weights, 0, True))
    assert max(wrong) > 0.1, "negative control: one pass rate for all prompts gives other chances"


def test_a_group_begun_under_another_group_size_does_no_harm() -> None:
    outlook = Outlook.of(4, [1.0] * 17, [])
    assert outlook.rate == pytest.approx(sum(prior(4)[1:-1]))
    assert outlook.chance(12, True) == outlook.chance(3, True)


def distribution(chances: Sequence[float]) -> np.ndarray:
    """[n + 1] exact distribution of a sum of independent yes-or-no outcomes."""
    total = np.ones(1)
    for chance in chances:
        total = np.convolve(total, [1 - chance, chance])
    return total


def test_mean_and_variance_are_those_of_the_exact_distribution() -> None:
    outlook = Outlook((5.0, 1.0, 0.5, 2.0, 9.0))
    tally = Tally()
    begun = {(2, 1): 3, (2, 2): 4, (3, 0): 2, (0, 0): 5, (3, 2): 1}
    for (num_finished, num_correct), amount in begun.items():
        tally.add(num_finished, num_correct, amount)
    chances = [1.0] * 4 + [outlook.chance(2, True)] * 4 + [outlook.chance(3, False)] * 2
    exact = distribution([*chances, *[outlook.rate] * 5])
    mean = float(exact @ np.arange(len(exact)))
    expected = Expected.of(tally, outlook)
    assert (expected.num_open, expected.certain) == (15, 4)
    assert expected.mean == pytest.approx(mean)
    assert expected.variance == pytest.approx(exact @ (np.arange(len(exact)) - mean) ** 2)


def success(needed: int, open_chances: list[float], rate: float, num_new: int) -> float:
    """Exact probability that the open groups and so many new ones hold enough."""
    exact = distribution([*open_chances, *[rate] * num_new])
    return float(exact[needed:].sum())


CASES = list(itertools.product([8, 24, 64, 256], [0.0, 0.5, 0.95], [0.25, 0.72, 0.95]))
"""(needed, how much of it is under way, rate of new prompts)."""


@pytest.mark.parametrize(("needed", "under_way", "rate"), CASES)
def test_the_number_of_new_prompts_is_enough_and_hardly_more(
    needed: int, under_way: float, rate: float
) -> None:
    """Between what suffices 19 times in 20 and what suffices 399 times in 400."""
    outlook = Outlook((1 - rate, rate, 0.0))
    mixed, alike = int(needed * under_way / 2), int(needed * under_way / 2 / rate)
    tally = Tally(mixed=mixed)
    tally.add(0, 0, alike)
    open_chances = [1.0] * mixed + [rate] * alike
    num_new = new_prompts(needed, Expected.of(tally, outlook), outlook)
    assert success(needed, open_chances, rate, num_new) > 0.95
    assert success(needed, open_chances, rate, max(0, num_new - 2)) < 0.9975


@pytest.mark.parametrize("rate", [0.25, 0.72])
def test_the_expected_number_is_not_enough(rate: float) -> None:
    """Negative control: without a reserve every second step needs another round."""
    outlook = Outlook((1 - rate, rate, 0.0))
    num_new = new_prompts(64, Expected.of(Tally(), outlook), outlook, safety=0.0)
    assert 0.4 < success(64, [], rate, num_new) < 0.7


def test_nothing_is_begun_when_enough_is_certain() -> None:
    outlook = Outlook.of(16)
    tally = Tally(mixed=7)
    tally.add(3, 0, 50)
    assert new_prompts(7, Expected.of(tally, outlook), outlook) == 0
    assert new_prompts(8, Expected.of(Tally(mixed=7), outlook), outlook) > 0


def test_the_number_of_open_groups_has_a_bound() -> None:
    """Where nothing is ever informative, prompts are not used up all at once."""
    outlook = Outlook.of(16, [1000.0] + [0.0] * 16)
    tally = Tally()
    tally.add(5, 0, 30)
    num_new = new_prompts(4, Expected.of(tally, outlook), outlook)
    assert num_new == forecast.MAX_OPEN * 4 - 30


# ------------------------------------------------------------------ what is measured


def test_only_what_lies_before_the_cut_is_measured() -> None:
    """A group that finishes behind the cut is a quick one: it says nothing about all."""
    world = World(make_prompts(50))
    world.start()
    leases = world.lease()
    for lease in leases[4:7]:
        world.answer(lease, [True, True])
    for lease in (leases[0], leases[2]):
        world.answer(lease, [False, False])
    world.answer(leases[3], [True, False])
    world.answer(leases[1], [True, False])
    assert world.take(1).groups is not None
    state = world.core.book.state
    assert state.history == [2.0, 2.0, 0.0]
    assert state.unmeasured == {}
    world.publish(1)
    for lease in world.lease()[:2]:
        world.answer(lease, [True, False])
    assert state.history == [1.0, 3.0, 0.0], "each batch halves what was before"


def test_a_later_batch_measures_what_lies_behind_an_earlier_cut() -> None:
    world = World(make_prompts(50), max_staleness=1)
    world.start()
    leases = world.lease()
    world.answer(leases[2], [True, True])
    world.answer(leases[4], [True, True])
    for lease in (leases[0], leases[1]):
        world.answer(lease, [True, False])
    state = world.core.book.state
    assert state.history == [0.0, 2.0, 0.0]
    assert state.unmeasured == {leases[2].group_id: True, leases[4].group_id: True}
    world.publish(1)
    for lease in (leases[3], leases[5]):
        world.answer(lease, [True, False])
    assert world.take(2).groups is not None
    assert state.history == [0.0, 3.0, 2.0]


def test_a_crash_changes_no_expectation() -> None:
    world = World(make_prompts(300), prompts_per_step=8, group_size=4)
    world.start()
    draw = random.Random(3)
    for lease in world.lease(free=10_000):
        for index in range(draw.randrange(4)):
            done = response(index, V0, is_correct=draw.random() < 0.5)
            world.submit(lease.lease_id, [done])
    before = world.core.desk
    world.crash()
    after = world.core.desk
    assert after is not before
    assert (after.num_new(), after.num_wanted()) == (before.num_new(), before.num_wanted())
    assert after.book.index.tally == before.book.index.tally
    assert after.book.index.certain == before.book.index.certain


def test_predicted_and_actual_acceptance_are_in_the_metrics() -> None:
    world = World(make_prompts(50))
    world.start()
    for _ in range(2):
        leases = world.lease()
        world.answer(leases[0], [True, True])
        for lease in leases[1:3]:
            world.answer(lease, [True, False])
        step = world.core.book.state.current_step - 1
        metrics = world.take(step).metrics
        world.publish(step)
    weights = [8 * 0.375, 8 * 0.25 + 2, 8 * 0.375 + 1]
    assert metrics["buffer/kept_frac_predicted"] == pytest.approx(weights[1] / sum(weights))
    assert metrics["buffer/kept_frac"] == pytest.approx(2 / 3)


# ------------------------------------------------------------------ who gets it


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_the_most_even_ones(seed: int) -> None:
    """Truth: give one group at a time to the actor with the fewest that has room."""
    draw = random.Random(seed)
    capacities = [draw.randrange(12) for _ in range(draw.randrange(1, 9))]
    total = draw.randrange(60)
    held = [0] * len(capacities)
    for _ in range(total):
        room = [i for i, capacity in enumerate(capacities) if held[i] < capacity]
        if room:
            held[min(room, key=held.__getitem__)] += 1
    share = selection.fair_share(total, capacities)
    given = [min(capacity, share.level) for capacity in capacities]
    above = [i for i, capacity in enumerate(capacities) if capacity > share.level]
    assert sum(given) + min(share.num_extra, len(above)) == sum(held)
    assert all(abs(g - h) <= 1 for g, h in zip(given, held, strict=True))


def test_a_small_engine_leaves_its_share_to_a_large_one() -> None:
    world = World(make_prompts(400), prompts_per_step=20, group_size=2)
    world.ask("small", None, free=4)
    world.ask("large", None, free=2000)
    world.start()
    wanted = world.core.desk.num_wanted()
    assert len(world.lease("large", free=2000)) == wanted - 2
    assert len(world.lease("small", free=4)) == 2
    assert world.lease("large", free=2000) == []


def test_no_engine_stays_without_work_while_another_holds_two_groups_more() -> None:
    names = [f"actor-{index}" for index in range(10)]
    world = World(make_prompts(400), prompts_per_step=4, group_size=2)
    for name in names:
        world.ask(name, None, free=100)
    world.start()
    wanted = world.core.desk.num_wanted()
    assert wanted % 10 != 0, "the case is about what is left after equal shares"
    held = [len(world.lease(name)) for name in names]
    assert sum(held) == wanted
    assert max(held) - min(held) == 1


def test_a_silent_actor_keeps_no_work_from_the_others() -> None:
    world = World(make_prompts(400), prompts_per_step=20)
    for name in ("dead", "a"):
        world.ask(name, None, free=1000)
    world.start()
    num_first = len(world.lease("a", free=1000))
    assert num_first == math.ceil(world.core.desk.num_wanted() / 2)
    world.tick(world.settings.lease_s / 4 + 1)
    assert len(world.lease("a", free=1000)) == world.core.desk.num_wanted() - num_first


def test_waiting_requests_wake_for_new_need_only() -> None:
    world = World(make_prompts(400), prompts_per_step=8, group_size=4)
    world.start()
    leases = world.lease(free=10_000)
    before = world.core.book.wakeups
    world.answer(leases[0], [True, False, True, True])
    assert world.core.book.wakeups == before, "an informative group was expected"
    for lease in leases[1:]:
        world.answer(lease, [False] * 4)
        if world.core.desk.num_new():
            break
    assert world.core.book.wakeups == before + 1
    assert len(world.lease("b", free=10_000)) > 0


# ------------------------------------------------------------------ closing


def one_step(seed: int) -> tuple[list[int], int]:
    """Responses of one step finish in random order. Returns (rows of the batch, responses)."""
    world = World(make_prompts(400), prompts_per_step=6, group_size=4)
    world.start()
    draw = random.Random(seed)
    rates = [draw.choice([0.0, 0.3, 0.7, 1.0]) for _ in range(400)]
    todo: list[tuple[float, int, int, int]] = []
    num_sampled = 0
    while True:
        for lease in world.lease(free=10_000):
            row = lease.prompt.row
            seconds = random.Random(f"{seed} {row}").random()
            todo += [(seconds + index / 9, lease.lease_id, row, index) for index in range(4)]
        todo.sort()
        _, lease_id, row, index = todo.pop(0)
        outcome = random.Random(f"{seed} {row} {index}").random() < rates[row]
        verdict = world.submit(lease_id, [response(index, V0, is_correct=outcome)])
        num_sampled += verdict == ["stored"]
        groups = world.take(1).groups
        if groups is not None:
            return [group.prompt_row for group in groups], num_sampled


def test_giving_up_early_saves_responses_and_changes_no_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    early = [one_step(seed) for seed in range(25)]
    monkeypatch.setattr(batches, "_cut_surplus", lambda _: None)
    late = [one_step(seed) for seed in range(25)]
    assert [rows for rows, _ in early] == [rows for rows, _ in late]
    assert sum(num for _, num in early) < sum(num for _, num in late)


def test_what_can_never_be_trained_is_given_up_before_the_batch_closes() -> None:
    world = World(make_prompts(50), group_size=3)
    world.start()
    leases = world.lease()
    assert len(leases) > 3
    for lease in leases[1:3]:
        done = [response(0, V0), response(1, V0, is_correct=False)]
        world.submit(lease.lease_id, done)
    assert world.take(1).groups is None
    reply = world.heartbeat(leases[3].lease_id)
    assert reply.abort == [lease.lease_id for lease in leases[3:]]
    assert set(world.core.book.index.live) == {lease.group_id for lease in leases[:3]}
    assert world.core.desk.num_new() == 0


@pytest.mark.parametrize("changes", [{"max_staleness": 1}, {"closing": "first_finished"}])
def test_nothing_is_given_up_early_where_it_may_still_be_trained(
    changes: dict[str, object],
) -> None:
    world = World(make_prompts(50), group_size=3, **changes)
    world.start()
    leases = world.lease()
    for lease in leases[1:3]:
        done = [response(0, V0), response(1, V0, is_correct=False)]
        world.submit(lease.lease_id, done)
    assert len(world.core.book.index.live) == len(leases)


def test_the_wait_for_the_tail_is_measured() -> None:
    world = World(make_prompts(50))
    world.start()
    leases = world.lease()
    world.answer(leases[1])
    world.tick(5.0)
    world.heartbeat(leases[0].lease_id)
    world.answer(leases[2])
    world.tick(7.0)
    world.answer(leases[0], [True, True])
    assert world.take(1).metrics["buffer/tail_wait_s"] == pytest.approx(7.0)
    world.publish(1)
    leases = world.lease()
    world.tick(3.0)
    for lease in leases[:2]:
        world.answer(lease)
    assert world.take(2).metrics["buffer/tail_wait_s"] == 0.0


def test_the_wait_for_the_learner_is_no_wait_for_the_tail() -> None:
    world = World(make_prompts(50), max_staleness=1)
    world.start()
    leases = world.lease()
    for lease in (*leases[:2], *leases[3:5]):
        world.answer(lease)
    world.tick(9.0)
    world.publish(1)
    world.heartbeat(leases[2].lease_id)
    world.tick(4.0)
    world.answer(leases[2])
    assert world.take(2).metrics["buffer/tail_wait_s"] == pytest.approx(4.0)


def test_first_finished_closes_with_whatever_is_ready() -> None:
    world = World(make_prompts(50), closing="first_finished")
    world.start()
    leases = world.lease()
    for lease in (leases[5], leases[2]):
        world.answer(lease)
    groups = world.take(1).groups
    assert groups is not None
    assert [g.group_id for g in groups] == [leases[2].group_id, leases[5].group_id]
    assert world.core.book.state.counters["train_surplus"] == len(leases) - 2
    world.publish(1)
    again = world.lease()
    assert again[0].prompt.uid == leases[0].prompt.uid, "what was given up comes first"
    assert world.core.check() == []


def test_without_dynamic_sampling_nothing_is_begun_on_suspicion() -> None:
    world = World(make_prompts(50), dynamic_sampling=False, prompts_per_step=5)
    world.start()
    leases = world.lease()
    assert len(leases) == 5
    world.answer(leases[0], [True, True])
    assert world.lease() == []


def test_an_evaluation_in_hand_takes_nothing_from_the_share_of_training() -> None:
    """The first weights are evaluated at once; an engine with room samples for training as well."""
    world = World(make_prompts(60, num_eval=40), prompts_per_step=4)
    for name in ("a", "b"):
        world.ask(name, None, free=1000)
    world.start(is_evaluated=True)
    wanted = world.core.desk.num_wanted()
    first = [x.kind for x in world.lease("a", free=1000)]
    second = [x.kind for x in world.lease("b", free=1000)]
    assert first.count("eval") == 80
    assert first.count("train") + second.count("train") == wanted
    assert 0 <= first.count("train") - second.count("train") <= 1


def test_what_waits_is_a_recount_whatever_happened_to_it() -> None:
    """The answer that is kept for polling actors follows every change."""
    world = World(make_prompts(60, num_eval=5), prompts_per_step=4, eval_samples=4)
    version = world.start(is_evaluated=True)
    desk, groups = world.core.desk, world.core.book.state.groups

    def check() -> None:
        waiting = [g for _, g in sorted(groups.items()) if g.is_waiting]
        assert desk.waiting("eval") == [g for g in waiting if g.kind == "eval"]
        assert desk.waiting("train") == [g for g in waiting if g.kind == "train"]
        assert desk.waiting("eval", version) == [g for g in waiting if g.version == version]
        missing = [len(group.missing()) for group in waiting]
        assert desk.fewest_missing() == min(missing, default=math.inf)

    check()
    leases = world.ask("a", version, free=12).leases
    check()
    world.release(leases[0].lease_id, is_failure=False)
    check()
    world.submit(leases[0].lease_id, [response(leases[0].missing[0].index, version)])
    check()
    assert desk.fewest_missing() == 1
    world.tick(31)
    check()
    world.start(0, is_evaluated=True)
    check()
