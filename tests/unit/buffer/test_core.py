"""What the buffer promises, one sentence and one test each, on the pure core."""

from __future__ import annotations

import numpy as np
import pytest

from dapo_hpc.buffer import accounting
from dapo_hpc.buffer import messages as msg
from dapo_hpc.buffer.core import Core, LineageFenced
from dapo_hpc.records import PolicyVersion
from tests.buffer_world import World, make_prompts, piece, response

V0 = PolicyVersion(step=0, lineage=1)


@pytest.fixture
def world() -> World:
    world = World()
    world.start()
    return world


def ids(reply: msg.TakeReply) -> list[int]:
    assert reply.groups is not None, "the batch is closed"
    return [group.group_id for group in reply.groups]


def test_nothing_is_leased_before_weights_are_published() -> None:
    world = World()
    assert world.ask("a", None).leases == []
    world.core.register(msg.RegisterRequest(step=0), world.now)
    reply = world.ask("a", V0)
    assert (reply.leases, reply.newest) == ([], None)


def test_an_actor_gets_whole_prompts_and_at_least_one_when_it_fits(world: World) -> None:
    assert [len(lease.missing) for lease in world.lease(free=3)] == [2]
    assert world.lease(actor="b", free=1) == []


def test_a_batch_is_the_first_informative_groups_in_dispatch_order(world: World) -> None:
    leases = world.lease()
    for lease in reversed(leases[1:]):
        world.answer(lease)
    assert world.take(1).groups is None
    world.answer(leases[0], [True, True])
    assert ids(world.take(1)) == [lease.group_id for lease in leases[1:3]]


def test_summary_says_what_was_submitted(world: World) -> None:
    first, second = world.lease()[:2]
    world.answer(first, [True, False], num_tokens=5)
    world.answer(second, [False, True], num_tokens=7)
    groups = world.take(1).groups
    assert groups is not None
    assert groups[0].is_correct == (True, False)
    assert groups[0].rewards == (1.0, -1.0)
    assert [group.num_tokens for group in groups] == [(5, 5), (7, 7)]
    assert [group.prompt_row for group in groups] == [first.prompt.row, second.prompt.row]
    assert groups[0].num_prompt_tokens == first.prompt.row + 1
    assert (groups[0].min_step, groups[0].max_step) == (0, 0)


def test_take_is_the_same_again_even_after_a_crash(world: World) -> None:
    first = world.fill(1)
    assert world.take(1) == first
    world.crash()
    assert world.take(1).groups == first.groups


def test_metrics_of_the_batch(world: World) -> None:
    leases = world.lease()
    world.answer(leases[0], [True, True])
    for lease in leases[1:3]:
        world.answer(lease, [True, False])
    metrics = world.take(1).metrics
    assert metrics["train/accuracy"] == 4 / 6
    assert metrics["buffer/kept_frac"] == 2 / 3
    assert metrics["buffer/groups_all_correct"] == 1
    assert metrics["buffer/tokens_all_correct"] == 6
    assert metrics["buffer/invariant_violations"] == 0
    assert metrics["buffer/staleness_max"] == 0
    assert metrics["actor/count"] == 1


def test_surplus_is_counted_and_its_prompts_come_first(world: World) -> None:
    leases = world.lease()
    assert len(leases) > 3
    world.answer(leases[3], num_tokens=4)
    world.heartbeat(leases[2].lease_id, [piece(0, 0, 6, V0)], [0])
    for lease in leases[:2]:
        world.answer(lease)
    counters = world.core.book.state.counters
    assert counters["tokens_surplus"] == 2 * 4 + 6
    assert counters["train_surplus"] == len(leases) - 2
    reply = world.heartbeat(leases[2].lease_id)
    assert leases[2].lease_id in reply.abort
    world.publish(1)
    again = world.lease()
    assert [x.prompt.uid for x in again[:2]] == [x.prompt.uid for x in leases[2:4]]
    assert all(x.group_id > leases[-1].group_id for x in again)
    assert all(len(part.token_ids) == 0 for part in again[0].missing)


def test_no_train_lease_between_the_close_and_the_next_weights(world: World) -> None:
    world.fill(1)
    assert world.lease() == []
    version = world.publish(1)
    assert world.ask("a", V0).leases == []
    assert world.ask("a", V0).newest == version
    assert len(world.ask("a", version).leases) > 0


def test_in_flight_follows_the_acceptance_rate() -> None:
    eager, thrifty = (
        World(make_prompts(400), prompts_per_step=10),
        World(make_prompts(400), prompts_per_step=10),
    )
    for world, share in ((eager, 0.1), (thrifty, 1.0)):
        world.start()
        for lease in world.lease(free=10_000):
            world.answer(lease, [lease.group_id % 10 < share * 10, False])
    assert thrifty.take(1).groups is not None
    assert eager.take(1).groups is None
    needed = 10 - eager.core.desk.num_ready()
    assert eager.core.desk.num_wanted() > 2 * needed
    thrifty.publish(1)
    assert 10 <= thrifty.core.desk.num_wanted() < 24


def test_without_dynamic_sampling_every_group_is_taken() -> None:
    world = World(dynamic_sampling=False)
    world.start()
    leases = world.lease()
    assert len(leases) == 2
    for lease in leases:
        world.answer(lease, [True, True])
    assert ids(world.take(1)) == [lease.group_id for lease in leases]


def test_two_actors_share(world: World) -> None:
    world.ask("b", None)
    wanted = world.core.desk.num_wanted()
    first, second = len(world.lease("a")), len(world.lease("b"))
    assert first + second == wanted
    assert 0 <= first - second <= 1


# leases


def test_expired_lease_goes_to_another_actor_with_its_tokens(world: World) -> None:
    lease = world.lease(free=2)[0]
    world.heartbeat(lease.lease_id, [piece(1, 0, 4, V0)], [0])
    world.heartbeat(lease.lease_id, [piece(1, 4, 2, V0)], [4])
    world.tick(31)
    assert world.core.book.state.counters["leases_expired"] == 1
    again = world.lease("b", free=2)[0]
    assert (again.group_id, again.attempt) == (lease.group_id, 1)
    prefix = again.missing[1]
    assert prefix.token_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert prefix.rollout_logprobs.dtype == np.float32
    assert [(s.start, s.version) for s in prefix.spans] == [(0, V0)]
    assert len(again.missing[0].token_ids) == 0


def test_tokens_sent_twice_are_kept_once(world: World) -> None:
    lease = world.lease(free=2)[0]
    world.heartbeat(lease.lease_id, [piece(0, 0, 4, V0)], [0])
    world.heartbeat(lease.lease_id, [piece(0, 0, 4, V0)], [0])
    world.heartbeat(lease.lease_id, [piece(0, 2, 5, V0)], [2])
    world.release(lease.lease_id, is_failure=False)
    assert world.lease("b", free=2)[0].missing[0].token_ids.tolist() == list(range(7))


def test_a_gap_in_the_tokens_is_refused(world: World) -> None:
    lease = world.lease(free=2)[0]
    with pytest.raises(ValueError, match="starts at token 3, but only 0 are stored"):
        world.heartbeat(lease.lease_id, [piece(0, 3, 2, V0)], [3])


def test_heartbeats_keep_a_lease(world: World) -> None:
    lease = world.lease(free=2)[0]
    for _ in range(5):
        world.tick(20)
        assert world.heartbeat(lease.lease_id).lost == []
    assert world.core.book.state.counters.get("leases_expired", 0) == 0


def test_a_buffer_that_stood_still_does_not_expire_leases(world: World) -> None:
    lease = world.lease(free=2)[0]
    world.now += 1000
    world.core.tick(world.now)
    assert world.heartbeat(lease.lease_id).lost == []


def test_reopening_gives_each_open_lease_its_full_time(world: World) -> None:
    lease = world.lease(free=2)[0]
    world.tick(29)
    world.crash()
    world.tick(29)
    assert world.heartbeat(lease.lease_id).lost == []


def test_late_response_of_an_expired_lease_is_kept_until_it_is_leased_anew(world: World) -> None:
    lease = world.lease(free=2)[0]
    world.tick(31)
    assert world.submit(lease.lease_id, [response(0, V0)]) == ["stored"]
    again = world.lease("b", free=2)[0]
    assert [part.index for part in again.missing] == [1]
    assert world.submit(lease.lease_id, [response(1, V0)]) == ["fenced"]
    assert world.core.book.state.counters["tokens_duplicate"] == 3
    assert world.submit(again.lease_id, [response(1, V0)], "b") == ["stored"]


def test_same_content_gets_the_same_answer_and_other_content_is_refused(world: World) -> None:
    lease = world.lease(free=2)[0]
    assert world.submit(lease.lease_id, [response(0, V0)]) == ["stored"]
    accepted = world.core.book.state.counters["responses_accepted"]
    assert world.submit(lease.lease_id, [response(0, V0)]) == ["stored"]
    assert world.core.book.state.counters["responses_accepted"] == accepted
    with pytest.raises(ValueError, match="response 0 .* already stored with other content"):
        world.submit(lease.lease_id, [response(0, V0, is_correct=False)])


def test_a_faulty_submit_stores_nothing(world: World) -> None:
    lease = world.lease(free=2)[0]
    with pytest.raises(ValueError, match="the lease is for responses"):
        world.submit(lease.lease_id, [response(0, V0), response(5, V0)])
    assert world.core.book.state.groups[lease.group_id].responses == {}
    with pytest.raises(ValueError, match="belongs to a"):
        world.submit(lease.lease_id, [response(0, V0)], "thief")
    with pytest.raises(ValueError, match="never handed out"):
        world.submit(999, [response(0, V0)])
    with pytest.raises(ValueError, match="never published"):
        world.submit(lease.lease_id, [response(0, PolicyVersion(step=7, lineage=1))])


def test_a_repeated_lease_call_gets_the_same_leases(world: World) -> None:
    first = world.ask("a", V0, call_id="x")
    world.crash()
    again = world.ask("a", V0, call_id="x")
    assert [x.lease_id for x in again.leases] == [x.lease_id for x in first.leases]
    fresh = world.ask("a", V0, call_id="y")
    assert not {x.lease_id for x in fresh.leases} & {x.lease_id for x in first.leases}


def test_a_prompt_that_fails_too_often_is_parked_and_blocks_nobody(world: World) -> None:
    leases = world.lease()
    for lease in leases[1:3]:
        world.answer(lease)
    lease_id = leases[0].lease_id
    for attempt in range(3):
        assert world.take(1).groups is None
        world.release(lease_id, is_failure=True)
        again = world.lease()
        if attempt < 2:
            assert again[0].group_id == leases[0].group_id
            lease_id = again[0].lease_id
    assert ids(world.take(1)) == [lease.group_id for lease in leases[1:3]]
    assert world.core.book.state.counters["train_parked"] == 1
    assert any("it is parked" in notice for notice in world.notices)
    assert world.core.check() == []


def test_a_drain_is_no_failure(world: World) -> None:
    for _ in range(10):
        lease = world.lease(free=2)[0]
        world.release(lease.lease_id, is_failure=False)
    assert world.core.book.state.groups[lease.group_id].failures == 0


# staleness


def test_larger_bound_keeps_what_lies_behind_the_cut() -> None:
    world = World(make_prompts(30), max_staleness=1)
    version = world.start()
    leases = world.lease()
    assert len(leases) > 4
    for lease in leases:
        world.answer(lease)
    assert ids(world.take(1)) == [lease.group_id for lease in leases[:2]]
    assert world.core.book.state.counters.get("train_surplus", 0) == 0
    assert world.take(2).groups is None
    world.publish(1)
    reply = world.take(2)
    assert ids(reply) == [lease.group_id for lease in leases[2:4]]
    assert reply.metrics["buffer/staleness_mean"] == 1
    world.publish(2)
    assert world.take(3).groups is None
    assert world.core.book.state.counters["train_stale"] == len(leases) - 4
    assert world.core.check() == []
    assert version == V0


def test_stale_tokens_of_unfinished_responses_start_anew() -> None:
    world = World(make_prompts(30), max_staleness=1)
    world.start()
    leases = world.lease()
    world.heartbeat(leases[4].lease_id, [piece(0, 0, 9, V0)], [0])
    for lease in leases[:4]:
        world.answer(lease)
    world.publish(1)
    assert world.take(2).groups is not None
    assert world.core.book.state.counters["tokens_stale"] == 9
    world.publish(2)
    again = next(x for x in world.lease() if x.group_id == leases[4].group_id)
    assert len(again.missing[0].token_ids) == 0
    assert leases[4].lease_id in world.heartbeat(leases[4].lease_id).abort


def test_ready_groups_are_bounded() -> None:
    world = World(make_prompts(200), max_staleness=2)
    world.start()
    for _ in range(30):
        for lease in world.lease(free=1000):
            world.answer(lease)
    first_guess = 4 / 0.25 + 4
    assert world.core.desk.num_ready() <= first_guess + 2 * 2


# exhaustion


def test_the_next_pass_follows_and_an_all_uniform_pass_is_said() -> None:
    world = World(make_prompts(4))
    world.start()
    for _ in range(8):
        for lease in world.lease():
            world.answer(lease, [True, True])
    assert any("0 groups were informative" in notice for notice in world.notices)
    assert world.core.book.state.passes > 2


def test_a_smaller_batch_when_the_prompts_run_dry() -> None:
    world = World(make_prompts(3), on_exhausted="smaller_batch")
    world.start()
    leases = world.lease()
    assert len(leases) == 3
    world.answer(leases[0], [True, False])
    for lease in leases[1:]:
        world.answer(lease, [True, True])
    assert ids(world.take(1)) == [leases[0].group_id]
    world.publish(1)
    assert len(world.lease()) == 3
    assert world.core.check() == []


def test_waiting_for_a_person_is_said_once_and_ended_by_config() -> None:
    world = World(make_prompts(2), on_exhausted="wait")
    world.start()
    for lease in world.lease():
        world.answer(lease, [True, True])
    world.tick(5)
    assert sum("so the run waits" in notice for notice in world.notices) == 1
    world.settings = type(world.settings)(
        **{f: getattr(world.settings, f) for f in world.settings.__slots__}
        | {"on_exhausted": "next_pass"}
    )
    world.crash()
    assert len(world.lease()) > 0


# lineages


def test_older_lineage_is_fenced(world: World) -> None:
    world.fill(1)
    world.start(0)
    for call in (lambda: world.take(1, lineage=1), lambda: world.publish(0, 1)):
        with pytest.raises(LineageFenced, match="lineage 2 registered after it"):
            call()


def test_rollback_replays_and_quarantines() -> None:
    world = World(make_prompts(30), max_staleness=1)
    world.start()
    first = world.fill(1)
    world.publish(1)
    second = world.fill(2)
    abandoned = world.publish(2)
    lease = next(x for x in world.lease(free=50) if not len(x.missing[0].token_ids))
    world.answer(lease, version=abandoned)
    version = world.start(0)
    counters = world.core.book.state.counters
    assert counters["train_quarantined"] >= 1
    assert counters["tokens_quarantined"] >= 6
    assert world.take(1).groups == first.groups
    assert world.take(2).groups == second.groups
    assert world.lease() == [], "the learner replays; nothing is sampled"
    world.publish(1, version.lineage)
    world.publish(2, version.lineage)
    rows = {x.prompt.row for x in world.lease()}
    assert lease.prompt.row in rows | {x.row for x in world.core.book.state.returned}
    assert world.core.check() == []


def test_what_surviving_weights_sampled_is_kept(world: World) -> None:
    lease = world.lease(free=2)[0]
    world.submit(lease.lease_id, [response(0, V0)])
    version = world.start(0)
    assert world.submit(lease.lease_id, [response(1, V0, is_correct=False)]) == ["stored"]
    assert world.core.book.state.groups[lease.group_id].state == "ready"
    assert version.lineage == 2


def test_abandoned_tokens_that_arrive_later_are_refused(world: World) -> None:
    world.fill(1)
    old = world.publish(1)
    lease = world.lease(free=2)[0]
    world.start(0)
    assert world.submit(lease.lease_id, [response(0, old)]) == ["fenced"]
    assert world.core.book.state.counters["tokens_quarantined"] == 3
    assert world.heartbeat(lease.lease_id).abort == [lease.lease_id]


def test_register_needs_a_step_that_this_buffer_knows(world: World) -> None:
    world.fill(1)
    world.publish(1)
    world.commit(1)
    for step in (0, 2):
        with pytest.raises(ValueError, match="can go back to steps 1 to 1"):
            world.core.register(msg.RegisterRequest(step=step), world.now)
    with pytest.raises(ValueError, match="cannot be taken"):
        world.take(1)


def test_commit_frees_payload_and_forgets_groups(world: World) -> None:
    world.fill(1)
    assert len(world.records) == 4
    world.publish(1)
    world.commit(1)
    assert list(world.records) == world.core.book.state.archive
    assert world.core.check() == []
    states = {group.state for group in world.core.book.state.groups.values()}
    assert states <= {"open", "ready"}


# evaluation


def evaluate(world: World, version: PolicyVersion, actor: str = "a") -> int:
    """Answer all evaluation leases an actor gets; row 0 right, others wrong. Returns how many."""
    leases = [x for x in world.ask(actor, version).leases if x.kind == "eval"]
    for lease in leases:
        world.answer(lease, [lease.prompt.row == 0] * len(lease.missing), actor)
    return len(leases)


def test_the_first_evaluation_runs_at_once() -> None:
    world = World()
    version = world.start(is_evaluated=True)
    leases = world.ask("a", version).leases
    evals = [x for x in leases if x.kind == "eval"]
    assert [len(x.missing) for x in evals] == [2, 1, 2, 1]
    assert leases[: len(evals)] == evals
    assert all(x.version == version for x in evals)
    for lease in evals:
        world.answer(lease, [lease.prompt.row == 0] * len(lease.missing), num_tokens=4)
    result = world.core.evaluations(world.now).results[0]
    assert (result.accuracy, result.pass_at_k, result.mean_tokens) == (0.5, 0.5, 4.0)
    assert (result.num_prompts, result.num_samples) == (2, 3)
    assert result.accuracy_by_source == {"even": 1.0, "odd": 0.0}
    assert world.core.check() == []


def test_evaluation_waits_for_training_and_holds_back_newer_weights() -> None:
    world = World()
    world.start()
    world.fill(1)
    version = world.publish(1, is_evaluated=True)
    leases = world.ask("a", version).leases
    assert {x.kind for x in leases} == {"train"}
    for lease in leases:
        world.answer(lease)
    assert world.take(2).groups is not None
    newer = world.publish(2)
    assert world.ask("a", version, free=2).newest == version
    world.tick(31)
    assert world.ask("a", version, free=0).newest == newer


def test_an_evaluation_finishes_though_its_actor_died() -> None:
    world = World()
    world.start()
    world.fill(1)
    version = world.publish(1, is_evaluated=True)
    for lease in world.ask("a", version).leases:
        world.answer(lease)
    dead = world.ask("a", version, free=2).leases
    assert [x.kind for x in dead] == ["eval"]
    newer = world.publish(2)
    assert world.ask("b", None).newest == newer
    world.tick(31)
    for lease in world.ask("b", newer).leases:
        world.answer(lease, actor="b")
    assert world.take(3).groups is not None
    assert world.ask("b", newer, free=0).newest == version, "nothing to train: go back"
    assert evaluate(world, version, "b") == 4
    assert [r.version for r in world.core.evaluations(world.now).results] == [version]


def test_a_pending_evaluation_moves_to_the_same_weights_of_a_new_lineage() -> None:
    world = World()
    version = world.start(is_evaluated=True)
    lease = next(x for x in world.ask("a", version, free=2).leases)
    again = world.start(0, is_evaluated=True)
    assert again != version
    world.answer(lease, version=version)
    assert evaluate(world, again, "b") == 3
    results = world.core.evaluations(world.now).results
    assert [r.version for r in results] == [again]


def test_abandoned_evaluations_are_forgotten() -> None:
    world = World()
    world.start()
    world.fill(1)
    version = world.publish(1, is_evaluated=True)
    for lease in world.ask("a", version).leases:
        world.answer(lease)
    assert len(world.ask("a", version, free=2).leases) == 1
    assert world.core.evaluations(world.now).num_pending == 1
    assert version in world.core.evaluations(world.now).versions_in_use
    world.start(0)
    assert world.core.evaluations(world.now).num_pending == 0
    assert world.core.check() == []


def test_finish_tells_everybody(world: World) -> None:
    world.ask("a", V0)
    world.core.finish(msg.FinishRequest(lineage=1))
    assert not world.core.is_everyone_told(world.now)
    assert world.ask("a", V0).is_done
    assert world.core.is_everyone_told(world.now)
    world.start(0)
    assert not world.ask("a", V0).is_done, "a learner that registers again goes on"


def test_the_last_step_is_the_last() -> None:
    world = World(total_steps=1)
    world.start()
    world.fill(1)
    version = world.publish(1)
    assert world.ask("a", version).leases == []
    with pytest.raises(ValueError, match="cannot be taken"):
        world.take(2)


def test_the_checks_find_a_lost_response(world: World) -> None:
    """Negative control of the run-time invariants."""
    world.fill(1)
    state = world.core.book.state
    group = state.groups[state.batches[1].group_ids[0]]
    del group.responses[0]
    sentences = accounting.violations(world.core.book, world.settings)
    assert any(sentence.startswith("I1") for sentence in sentences)
    assert any(sentence.startswith("I5") for sentence in sentences)


def test_news_is_what_an_actor_can_act_on(world: World) -> None:
    request = msg.LeaseRequest(
        actor="a", version=V0, max_responses=0, wait_s=1.0, stats=msg.ActorStats()
    )
    assert not Core.is_news(request, world.ask("a", V0, free=0))
    world.fill(1)
    world.publish(1)
    assert Core.is_news(request, world.ask("a", V0, free=0))


def test_a_record_freed_while_it_is_read_is_a_sentence() -> None:
    """A commit of a newer learner, beside an old one's fetch in another thread."""
    world = World()
    world.start()
    reply = world.fill(1)
    assert reply.groups is not None
    request = msg.FetchRequest(group_ids=[reply.groups[0].group_id])
    assert world.core.fetch(request).groups[0].records
    world.records.clear()
    with pytest.raises(ValueError, match="in no batch that is still kept"):
        world.core.fetch(request)


def test_an_actor_that_holds_nothing_leaves_nothing_behind() -> None:
    """Preempted actors come back under new names, without end."""
    world = World()
    version = world.start()
    for number in range(50):
        actor = f"actor-{number}"
        leases = world.ask(actor, version, 4).leases
        assert leases
        for lease in leases:
            world.release(lease.lease_id, is_failure=False, actor=actor)
    assert world.core.desk._held == world.core.desk._training == {}
