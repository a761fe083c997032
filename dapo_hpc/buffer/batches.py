"""The learner's side: versions published, batches closed, taken and released, lineages."""

from __future__ import annotations

import itertools

from dapo_hpc.buffer import accounting, exhaustion, selection
from dapo_hpc.buffer import events as ev
from dapo_hpc.buffer.desk import Desk
from dapo_hpc.buffer.grants import is_pass_used_up
from dapo_hpc.buffer.group import Group
from dapo_hpc.records import GroupSummary, PolicyVersion


def advance(desk: Desk, now: float) -> None:
    """Do all that has become possible: close batches, finish evaluations, open a pass."""
    while _close_batch(desk, now):
        pass
    _cut_surplus(desk)
    exhaustion.say_uniform(desk)
    _finish_evaluations(desk)
    if desk.settings.on_exhausted != "next_pass" and is_pass_used_up(desk):
        _end_of_pass(desk, now)


def _may_close(desk: Desk) -> bool:
    """A batch closes when the weights that precede it are published: someone will train it."""
    state = desk.book.state
    is_due = state.newest is not None and state.current_step <= state.newest.step + 1
    return is_due and state.current_step <= desk.settings.total_steps


def _close_batch(desk: Desk, now: float) -> bool:
    settings = desk.settings
    if desk.num_ready() < settings.prompts_per_step or not _may_close(desk):
        desk.full_since = None
        return False
    if desk.full_since is None:
        desk.full_since = now
    groups = selection.closable_batch(
        desk.book.index.live.values(), settings.prompts_per_step, settings.closing
    )
    if groups is None:
        return False
    _close(desk, groups, now)
    return True


def _close(desk: Desk, groups: list[Group], now: float) -> None:
    """Fix the batch of the current step, then deal with what lies behind the cut."""
    state, settings = desk.book.state, desk.settings
    step = state.current_step
    metrics = {
        **_own_metrics(desk),
        **accounting.batch_staleness(step, groups),
        **desk.fleet.metrics(now),
        "buffer/passes": state.cursor // desk.prompts.order.num_rows,
        "buffer/kept_frac_predicted": desk.predicted_rate,
        "buffer/tail_wait_s": 0.0 if desk.full_since is None else now - desk.full_since,
    }
    cut = max(group.group_id for group in groups)
    event = ev.BatchClosed(
        step=step,
        group_ids=[group.group_id for group in groups],
        expected_groups=settings.prompts_per_step,
        is_short=len(groups) < settings.prompts_per_step,
        min_step=desk.oldest_step(),
        is_filtered=settings.dynamic_sampling,
        measured=_measured(desk, groups, cut),
        measured_to=cut if settings.max_staleness else state.next_group_id - 1,
        metrics={name: float(value) for name, value in metrics.items()},
        actor_stats=desk.fleet.stats(),
    )
    desk.emit(event)
    desk.full_since = desk.waiting_since = None
    desk.predicted_rate = desk.acceptance_rate()
    for group in list(desk.book.index.live.values()):
        _keep_or_drop(desk, group)


def _own_metrics(desk: Desk) -> dict[str, float]:
    desk.audit.look(desk.book, desk.settings)
    generated_tokens = desk.fleet.totals().generated_tokens
    return accounting.buffer_metrics(desk.book, generated_tokens, desk.audit.counts())


def _measured(desk: Desk, groups: list[Group], cut: int) -> list[int]:
    """Groups by number of correct responses: those of the batch, and the uniform ones between them.

    Not what finished behind the cut: the hardest prompts are missing there, because they take long.
    """
    size = desk.settings.group_size
    measured = [0] * (size + 1)
    for group in groups:
        if len(group.indices) == size:
            measured[group.num_correct] += 1
    for group_id, is_all_correct in desk.book.state.unmeasured.items():
        if group_id <= cut:
            measured[size if is_all_correct else 0] += 1
    return measured


def _cut_surplus(desk: Desk) -> None:
    """Give up at once what can never enter a batch of a synchronous run.

    When enough groups are certain to be informative, the batch closes with the last of them at the
    latest, so that whatever was dispatched behind it is surplus. The batch stays the same.
    """
    settings = desk.settings
    is_cut = settings.max_staleness == 0 and settings.closing == "dispatch_order"
    if not is_cut or len(desk.book.index.certain) < settings.prompts_per_step:
        return
    last = desk.book.index.certain[settings.prompts_per_step - 1]
    behind = itertools.takewhile(lambda group_id: group_id > last, reversed(desk.book.index.live))
    for group_id in sorted(behind):
        desk.drop_group(desk.book.index.live[group_id], "surplus")


def _keep_or_drop(desk: Desk, group: Group) -> None:
    """Behind the cut: surplus in a synchronous run; else kept while its tokens are fresh."""
    if desk.settings.max_staleness == 0:
        desk.drop_group(group, "surplus")
    elif _oldest(group.response_versions()) < desk.oldest_step():
        desk.drop_group(group, "stale")
    elif _oldest(group.partial_versions()) < desk.oldest_step():
        lease = desk.live_lease(group)
        if lease is not None:
            desk.end_lease(lease, "aborted")
        desk.emit(ev.PartialsDropped(group_id=group.group_id))


def _oldest(versions: set[PolicyVersion]) -> float:
    return min((version.step for version in versions), default=float("inf"))


def _end_of_pass(desk: Desk, now: float) -> None:
    """The order has ended: train on what there is, or wait for a person."""
    num_ready = desk.num_ready()
    if num_ready < len(desk.book.index.live) or desk.num_wanted() == 0 or not _may_close(desk):
        return
    if desk.settings.on_exhausted == "wait":
        exhaustion.say_waiting(desk, now)
        return
    exhaustion.say_smaller(desk, now)
    if num_ready:
        _close(desk, list(desk.book.index.live.values()), now)
    desk.emit(ev.PassOpened())


def _finish_evaluations(desk: Desk) -> None:
    groups = desk.book.state.groups
    for index, evaluation in reversed(list(enumerate(desk.book.state.evaluations))):
        if all(groups[group_id].state != "open" for group_id in evaluation.group_ids):
            result = accounting.eval_result(desk.book, index, desk.prompts.eval)
            desk.emit(ev.Evaluated(result=result))


def register(desk: Desk, step: int) -> int:
    """A learner starts from `step` trained steps. Returns its lineage.

    Batches of later steps stay as they are and are handed out again. What newer, now abandoned
    weights sampled and no batch holds is quarantined; its prompts are asked again first.
    """
    state = desk.book.state
    if not state.committed_step <= step < state.current_step:
        raise ValueError(
            f"the learner starts from step {step}, but this buffer can go back to steps "
            f"{state.committed_step} to {state.current_step - 1}: earlier batches are released, "
            "later ones were never formed. Checkpoints and buffer are not of the same run."
        )
    desk.emit(ev.Registered(lineage=state.lineage + 1, step=step))
    for group in [g for g in state.groups.values() if g.state in ("open", "ready")]:
        _quarantine(desk, group)
    return state.lineage


def _quarantine(desk: Desk, group: Group) -> None:
    sampled = group.response_versions() | group.partial_versions()
    pinned = {group.version} if group.version is not None else set()
    lease = desk.live_lease(group)
    if any(desk.book.is_abandoned(version) for version in sampled | pinned):
        desk.drop_group(group, "quarantined")
    elif lease is not None and desk.book.is_abandoned(lease.version):
        desk.end_lease(lease, "aborted")


def publish(desk: Desk, version: PolicyVersion, *, is_evaluated: bool, now: float) -> None:
    """New weights are there. Safe to repeat."""
    desk.check_lineage(version.lineage)
    state = desk.book.state
    if version.step >= state.current_step:
        raise ValueError(
            f"version {version.name} is published, but the batch of step {version.step} was never "
            f"formed; step {state.current_step} is being filled."
        )
    plan = _evaluation_plan(desk, version) if is_evaluated else None
    is_newer = state.newest is None or version > state.newest
    if is_newer or plan is not None:
        desk.emit(ev.Published(version=version, evaluation=plan))
    if is_newer:
        desk.newest_since = now


def _evaluation_plan(desk: Desk, version: PolicyVersion) -> ev.EvaluationPlan | None:
    """None when that is under way for these weights, or done, or there are no held-out prompts."""
    state = desk.book.state
    is_pending = any(e.version.step == version.step for e in state.evaluations)
    is_done = any(result.version == version for result in state.results)
    if is_pending or is_done or not desk.prompts.eval:
        return None
    return ev.EvaluationPlan(
        num_prompts=len(desk.prompts.eval),
        num_samples=desk.settings.eval_samples,
        unit_size=min(desk.settings.group_size, desk.settings.eval_samples),
    )


def take(desk: Desk, lineage: int, step: int) -> tuple[list[GroupSummary], dict[str, float]] | None:
    """The batch of a step with its figures, always the same; None while it is not closed."""
    desk.check_lineage(lineage)
    state = desk.book.state
    batch = state.batches.get(step)
    if batch is None:
        if step != state.current_step or step > desk.settings.total_steps:
            raise ValueError(
                f"step {step} cannot be taken: steps up to {state.committed_step} are released, "
                f"step {state.current_step} of {desk.settings.total_steps} is being filled."
            )
        return None
    return [_summary(desk, state.groups[g]) for g in batch.group_ids], dict(batch.metrics)


def _summary(desk: Desk, group: Group) -> GroupSummary:
    return group.summary(len(desk.prompts.train[group.row].token_ids))


def commit(desk: Desk, lineage: int, step: int) -> None:
    """Batches up to `step` are never asked for again. Safe to repeat."""
    desk.check_lineage(lineage)
    state = desk.book.state
    if step >= state.current_step:
        raise ValueError(
            f"step {step} is committed, but step {state.current_step} is still being filled."
        )
    if step > state.committed_step:
        desk.emit(ev.Committed(step=step))
