"""Who gets which lease, and which weights an actor is told to hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dapo_hpc.buffer import events as ev
from dapo_hpc.buffer import exhaustion, selection, suspects
from dapo_hpc.buffer.desk import Desk
from dapo_hpc.buffer.fleet import ActorView
from dapo_hpc.buffer.group import Group, LeaseRecord
from dapo_hpc.buffer.messages import decode
from dapo_hpc.records import Lease, PartialResponse, PolicyVersion, VersionSpan


def newest_for(desk: Desk, view: ActorView, now: float) -> PolicyVersion | None:
    """The weights an actor should hold.

    The newest published ones, except that (1) an actor that holds a version with evaluation work
    left keeps it for up to lease_s after a newer one appeared, and (2) while there is nothing to
    train, actors go (back) to the oldest version with evaluation work left, those that sample
    training responses excepted: their tokens would be too old. So an evaluation finishes even if
    every actor that held its version is gone.
    """
    newest = desk.book.state.newest
    if newest is None:
        return None
    is_training = bool(desk.waiting("train") or desk.held_groups(view.name, "train"))
    is_idle = desk.num_wanted() == 0 and not is_training
    is_held_back = is_idle or now < desk.newest_since + desk.settings.lease_s
    if view.version is not None and is_held_back and _has_eval_work(desk, view):
        return view.version
    pending = [group.version for group in desk.waiting("eval")] if is_idle else []
    return min((version for version in pending if version is not None), default=newest)


def _has_eval_work(desk: Desk, view: ActorView) -> bool:
    if desk.waiting("eval", view.version):
        return True
    return bool(desk.held_groups(view.name, "eval"))


@dataclass(frozen=True, slots=True)
class Call:
    """An actor that asks for leases, and the weights it holds."""

    actor: str
    version: PolicyVersion
    call_id: str
    now: float


def grant(desk: Desk, call: Call, max_responses: int) -> list[Lease]:
    """Leases for the free places of an actor.

    Training first; evaluation when the actor has no training lease, or at once for the first and
    the last version of a run. A call whose answer was lost gets the same leases again.
    """
    if desk.book.state.is_finished or desk.book.is_abandoned(call.version):
        return []
    granted = [x for x in desk.live_leases(call.actor) if x.call_id == call.call_id]
    if granted:
        return [_lease_message(desk, lease) for lease in granted]
    suspect = suspects.on_trial(desk, call.actor, call.version, call.now)
    if suspect is not None:
        return _grant_fitting(desk, call, suspect, max_responses)
    leases: list[Lease] = []
    is_first_or_last = call.version.step in (0, desk.settings.total_steps)
    if is_first_or_last:
        leases += _grant_eval(desk, call, max_responses)
    leases += _grant_train(desk, call, max_responses - _places(leases))
    if not is_first_or_last and not desk.held_groups(call.actor, "train"):
        leases += _grant_eval(desk, call, max_responses - _places(leases))
    return leases


def _places(leases: list[Lease]) -> int:
    return sum(len(lease.missing) for lease in leases)


def _grant_eval(desk: Desk, call: Call, free: int) -> list[Lease]:
    if free < desk.fewest_missing():
        return []
    return _grant_fitting(desk, call, suspects.cleared(desk.waiting("eval", call.version)), free)


def _grant_train(desk: Desk, call: Call, free: int) -> list[Lease]:
    """Groups that lost their lease first, then new prompts up to the number wanted."""
    if call.version != desk.book.state.newest or call.version.step < desk.oldest_step():
        return []
    waiting = suspects.cleared(desk.waiting("train"))
    leases = _grant_fitting(desk, call, waiting, free)
    if len(leases) < len(waiting):
        return leases
    free -= _places(leases)
    for _ in range(_num_new(desk, call)):
        group = _dispatch(desk, call.now) if desk.settings.group_size <= free else None
        if group is None:
            break
        leases.append(_lease(desk, group, call))
        free -= desk.settings.group_size
    return leases


def _grant_fitting(desk: Desk, call: Call, groups: list[Group], free: int) -> list[Lease]:
    """Whole groups only, in order; one that does not fit leaves room for a smaller one."""
    leases: list[Lease] = []
    if free < desk.fewest_missing():
        return leases
    for group in groups:
        if group.num_missing <= free:
            leases.append(_lease(desk, group, call))
            free -= len(leases[-1].missing)
    return leases


def _num_new(desk: Desk, call: Call) -> int:
    """Prompts an actor may begin: what is wanted, within its share of all that is under way."""
    num_new = desk.num_new()
    if num_new == 0:
        return 0
    size = desk.settings.group_size
    present = desk.fleet.present(call.now)
    share = selection.fair_share(desk.num_wanted(), [v.max_responses // size for v in present])
    num_above = sum(desk.num_training(view.name) > share.level for view in present)
    level = share.level + (num_above < share.num_extra)
    return int(max(0, min(num_new, level - desk.num_training(call.actor))))


def _dispatch(desk: Desk, now: float) -> Group | None:
    """The next prompt of the order as a new group; None when the order has ended for now.

    A parked prompt that comes again, in a later pass, is passed over and counted.
    """
    state = desk.book.state
    while True:
        if len(state.parked_rows) == desk.prompts.order.num_rows:
            exhaustion.say_all_parked(desk, now)
            return None
        if state.returned:
            head = state.returned[0]
            position, row, failures, deaths = head.position, head.row, head.failures, head.deaths
        else:
            if not _may_advance(desk, now):
                return None
            position, failures, deaths = state.cursor, 0, 0
            row = desk.prompts.order.at(position)[1]
        event = ev.Dispatched(
            group_id=state.next_group_id,
            position=position,
            row=row,
            is_returned=bool(state.returned),
            failures=failures,
            deaths=deaths,
            group_size=desk.settings.group_size,
        )
        is_parked = row in state.parked_rows
        desk.emit(event)
        if not is_parked:
            return state.groups[event.group_id]
        desk.emit(ev.GroupDropped(group_id=event.group_id, state="parked", is_returned=False))


def is_pass_used_up(desk: Desk) -> bool:
    """Every prompt of the passes opened so far was dispatched, and none is to be asked again."""
    state = desk.book.state
    return not state.returned and state.cursor >= state.passes * desk.prompts.order.num_rows


def _may_advance(desk: Desk, now: float) -> bool:
    if not is_pass_used_up(desk):
        return True
    if desk.settings.on_exhausted == "next_pass":
        exhaustion.say_next_pass(desk, now)
        desk.emit(ev.PassOpened())
        return True
    return False


def _lease(desk: Desk, group: Group, call: Call) -> Lease:
    """Give the missing responses of a group to an actor."""
    event = ev.Leased(
        lease_id=desk.book.state.next_lease_id,
        group_id=group.group_id,
        actor=call.actor,
        version=call.version,
        indices=group.missing(),
        call_id=call.call_id,
    )
    desk.emit(event)
    lease = desk.book.state.leases[event.lease_id]
    desk.extend(lease, call.now)
    return _lease_message(desk, lease)


def _lease_message(desk: Desk, lease: LeaseRecord) -> Lease:
    """What the actor is told, with the tokens already sampled."""
    group = desk.book.state.groups[lease.group_id]
    table = desk.prompts.train if group.kind == "train" else desk.prompts.eval
    return Lease(
        lease_id=lease.lease_id,
        group_id=group.group_id,
        kind=group.kind,
        attempt=len(group.lease_ids) - 1,
        prompt=table[group.row],
        missing=_known(desk, group, desk.book.unfilled(lease)),
        version=group.version,
        lease_s=desk.settings.lease_s,
    )


def _known(desk: Desk, group: Group, indices: list[int]) -> tuple[PartialResponse, ...]:
    """What is stored of unfinished responses."""
    pieces: dict[int, list[PartialResponse]] = {index: [] for index in indices}
    for chunk in group.chunks:
        for part in decode(desk.read_record(chunk.record_id), list[PartialResponse]):
            if part.index in pieces:
                pieces[part.index].append(part)
    return tuple(join_pieces(index, parts) for index, parts in pieces.items())


def join_pieces(index: int, parts: list[PartialResponse]) -> PartialResponse:
    """One response out of its consecutive pieces."""
    spans: list[VersionSpan] = []
    for span in (span for part in parts for span in part.spans):
        if not spans or spans[-1].version != span.version:
            spans.append(span)
    return PartialResponse(
        index=index,
        token_ids=_joined([part.token_ids for part in parts], np.int32),
        rollout_logprobs=_joined([part.rollout_logprobs for part in parts], np.float32),
        spans=tuple(spans),
    )


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays])
