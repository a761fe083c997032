"""What the log says when prompts run out, or no group is informative. None of it ends a run."""

from __future__ import annotations

from dapo_hpc.buffer.desk import Desk

REPEAT_S = 600.0
"""Between two notices of the same lasting state."""
UNIFORM_BATCHES = 8
"""Uniform groups for one step, in batches, from which the log says so; again at each doubling."""


def say_waiting(desk: Desk, now: float) -> None:
    """prompts.on_exhausted = 'wait': a person must act."""
    state = desk.book.state
    waited = ""
    if desk.waiting_since is None:
        desk.waiting_since = now
    elif now - desk.waiting_since >= REPEAT_S:
        waited = f" It has waited for {(now - desk.waiting_since) / 60:.0f} minutes."
    _say_now_and_then(
        desk,
        "wait",
        f"all {desk.prompts.order.num_rows} prompts are used and step {state.current_step} has "
        f"{desk.num_ready()} of {desk.settings.prompts_per_step} groups; prompts.on_exhausted is "
        "'wait', so the run waits. Set it to 'next_pass' or 'smaller_batch' and restart."
        f"{waited} {_outcomes(desk)}",
        now,
    )


def say_smaller(desk: Desk, now: float) -> None:
    """prompts.on_exhausted = 'smaller_batch': what is ready is trained, if anything is."""
    num_ready, step = desk.num_ready(), desk.book.state.current_step
    head = f"all {desk.prompts.order.num_rows} prompts are used and step {step} has"
    if num_ready:
        desk.notices.append(
            f"{head} {num_ready} of {desk.settings.prompts_per_step} groups; prompts.on_exhausted "
            f"is 'smaller_batch', so the step trains on {num_ready}."
        )
    else:
        sentence = (
            f"{head} no informative group; there is nothing to train, so another pass begins."
        )
        _say_now_and_then(desk, "smaller", f"{sentence} {_outcomes(desk)}", now)


def say_next_pass(desk: Desk, now: float) -> None:
    """Another pass over the prompts begins."""
    _say_now_and_then(
        desk,
        "pass",
        f"pass {desk.book.state.passes} over the {desk.prompts.order.num_rows} prompts is used up; "
        f"pass {desk.book.state.passes + 1} begins. {_outcomes(desk)} "
        f"{desk.acceptance_rate():.0%} of those to come are expected to be informative.",
        now,
    )


def say_all_parked(desk: Desk, now: float) -> None:
    """Nothing is left to ask."""
    _say_now_and_then(
        desk,
        "parked",
        f"all {desk.prompts.order.num_rows} prompts are parked: each failed or killed its actors. "
        "The run waits for a person. See the notices above and the logs of the actors.",
        now,
    )


def say_uniform(desk: Desk) -> None:
    """Many groups finished for this step, and hardly one is informative; sampling goes on."""
    window = desk.book.state.window
    num_uniform = window.groups - window.informative
    if num_uniform == 0:
        desk.uniform_limit = UNIFORM_BATCHES * desk.settings.prompts_per_step
    if not desk.settings.dynamic_sampling or num_uniform < desk.uniform_limit:
        return
    desk.uniform_limit = 2 * num_uniform
    num_correct = window.by_correct[-1] if window.by_correct else 0
    desk.notices.append(
        f"step {desk.book.state.current_step}: {window.groups} groups finished and "
        f"{window.informative} of them are informative ({num_correct} all correct, "
        f"{num_uniform - num_correct} all wrong); sampling goes on. If this lasts, the prompts are "
        "too easy or too hard for the policy, or the scorer rejects its format."
    )


def _outcomes(desk: Desk) -> str:
    counters = desk.book.state.counters
    return (
        f"Since the start {counters.get('groups_informative', 0)} groups were informative, "
        f"{counters.get('train_all_correct', 0)} all correct, "
        f"{counters.get('train_all_wrong', 0)} all wrong, "
        f"{counters.get('train_parked', 0)} parked."
    )


def _say_now_and_then(desk: Desk, key: str, sentence: str, now: float) -> None:
    """At once, then at most every REPEAT_S; what was left out in between is counted."""
    last_s, num_omitted = desk.said.get(key, (float("-inf"), 0))
    if now - last_s < REPEAT_S:
        desk.said[key] = (last_s, num_omitted + 1)
        return
    more = f" (the same {num_omitted} times in between)" if num_omitted else ""
    desk.said[key] = (now, 0)
    desk.notices.append(sentence + (more if key == "pass" else ""))
