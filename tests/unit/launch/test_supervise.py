"""The restart rules, without any process."""

from __future__ import annotations

from dapo_hpc.launch.supervise import (
    Decision,
    Exit,
    Finish,
    GiveUp,
    Leave,
    Restart,
    RestartPolicy,
    exit_text,
)
from dapo_hpc.observe.final import IDLE_EXIT


def policy(max_restarts: int = 2, ranks: int = 1) -> RestartPolicy:
    sizes = {"buffer": 1, "actor-0": 1, "learner": ranks}
    return RestartPolicy(leader="learner", sizes=sizes, max_restarts=max_restarts)


def ended(unit: str, code: int) -> Exit:
    return Exit(unit=unit, process=unit, code=code)


def decide(rules: RestartPolicy, exit: Exit, step: int = 0) -> Decision:
    return rules.decide(exit, is_complete=True, step=step)


def test_exit_0_of_every_leader_rank_is_the_end_of_the_run() -> None:
    rules = policy(ranks=2)
    assert decide(rules, ended("learner", 0)) == "wait"
    assert decide(rules, ended("learner", 0)) == Finish()


def test_a_leader_rank_that_dies_after_another_has_finished_restarts_all() -> None:
    rules = policy(ranks=2)
    assert decide(rules, ended("learner", 0)) == "wait"
    assert decide(rules, ended("learner", 1)) == Restart(unit="learner", delay_s=1.0, number=1)
    assert decide(rules, ended("learner", 0)) == "wait", "the exit of the earlier life counted"
    assert decide(rules, ended("learner", 0)) == Finish()


def test_delays_grow_and_the_limit_ends_the_run() -> None:
    rules = policy(max_restarts=3)
    delays = []
    for _ in range(3):
        decision = decide(rules, ended("actor-0", -9))
        assert isinstance(decision, Restart)
        delays.append(decision.delay_s)
    assert delays == [1.0, 2.0, 4.0]
    assert decide(rules, ended("actor-0", -9)) == GiveUp(unit="actor-0", restarts=3)


def test_a_further_step_gives_all_restarts_back() -> None:
    """Preempted once a day, a unit lives for ever; dying at the same step, it does not."""
    rules = policy(max_restarts=2)
    for step in range(10):
        assert decide(rules, ended("actor-0", -9), step) == Restart(
            unit="actor-0", delay_s=1.0, number=1
        )
        assert decide(rules, ended("actor-0", -9), step) == Restart(
            unit="actor-0", delay_s=2.0, number=2
        )
    assert isinstance(decide(rules, ended("actor-0", -9), 9), GiveUp)


def test_going_over_old_steps_again_is_no_progress() -> None:
    """The learner that dies at step 7 goes back to its checkpoint and dies at step 7."""
    rules = policy(max_restarts=2)
    assert isinstance(decide(rules, ended("learner", 1), 7), Restart)
    assert isinstance(decide(rules, ended("learner", 1), 7), Restart)
    assert isinstance(decide(rules, ended("learner", 1), 7), GiveUp)


def test_units_have_their_own_limits() -> None:
    rules = policy(max_restarts=1)
    assert isinstance(decide(rules, ended("buffer", 1)), Restart)
    assert isinstance(decide(rules, ended("actor-0", 1)), Restart)
    assert isinstance(decide(rules, ended("buffer", 1)), GiveUp)


def test_an_actor_that_leaves_quietly_is_started_again_but_not_at_once() -> None:
    decision = decide(policy(), ended("actor-0", 0))
    assert decision == Restart(unit="actor-0", delay_s=5.0, number=1)


def test_delay_has_a_ceiling() -> None:
    rules = policy(max_restarts=20)
    delays = [getattr(decide(rules, ended("buffer", 1)), "delay_s", None) for _ in range(20)]
    assert delays[-1] == 30.0


def test_exit_text_names_signals() -> None:
    assert exit_text(3) == "exit 3"
    assert exit_text(-9) == "killed by SIGKILL"
    assert exit_text(-250) == "killed by signal 250"


def test_a_leader_that_was_told_to_stop_has_not_finished_the_run() -> None:
    decision = policy().decide(ended("learner", 0), is_complete=False, step=0)
    assert decision == Restart(unit="learner", delay_s=5.0, number=1)


def equals() -> RestartPolicy:
    """The actors of one job."""
    return RestartPolicy(leader=None, sizes={"actor-0": 1, "actor-1": 1}, max_restarts=2)


def test_without_a_leader_an_idle_unit_leaves_and_stays_away() -> None:
    assert decide(equals(), ended("actor-0", IDLE_EXIT)) == Leave(unit="actor-0", is_idle=True)


def test_without_a_leader_units_leave_a_run_that_is_complete() -> None:
    assert decide(equals(), ended("actor-0", 0)) == Leave(unit="actor-0", is_idle=False)
    early = equals().decide(ended("actor-0", 0), is_complete=False, step=0)
    assert early == Restart(unit="actor-0", delay_s=5.0, number=1)


def test_beside_a_leader_the_code_of_an_idle_actor_is_a_death() -> None:
    assert isinstance(decide(policy(), ended("actor-0", IDLE_EXIT)), Restart)
