"""Who gets which lease, and which weights an actor is told to hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dapo_hpc.buffer import events as ev
from dapo_hpc.buffer import selection
from dapo_hpc.buffer.desk import Desk
from dapo_hpc.buffer.fleet import ActorView
from dapo_hpc.buffer.group import Chunk, Group, LeaseRecord
from dapo_hpc.buffer.messages import decode
from dapo_hpc.records import Lease, PartialResponse, PolicyVersion, VersionSpan


def newest_for(desk: Desk, view: ActorView, now: float) -> PolicyVersion | None:
    """The weights an actor should hold.

    The newest published ones, except that (1) an actor that holds a version with evaluation work
    left keeps it for up to lease_s after a newer one appeared, and (2) while there is nothing to
    train, actors go (back) to the oldest version with evaluation work left. So an evaluation
    finishes even if every actor that held its version is gone.
    """
    newest = desk.book.state.newest
    if newest is None:
        return None
    is_idle = desk.num_wanted() == 0 and not desk.waiting("train")
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
    return _grant_fitting(desk, call, desk.waiting("eval", call.version), free)


def _grant_train(desk: Desk, call: Call, free: int) -> list[Lease]:
    """Groups that lost their lease first, then new prompts up to the number wanted."""
    if call.version != desk.book.state.newest or call.version.step < desk.oldest_step():
        return []
    waiting = desk.waiting("train")
    leases = _grant_fitting(desk, call, waiting, free)
    if len(leases) < len(waiting):
        return leases
    free -= _places(leases)
    for _ in range(_num_new(desk, call)):
        group = _dispatch(desk) if desk.settings.group_size <= free else None
        if group is None:
            break
        leases.append(_lease(desk, group, call))
        free -= desk.settings.group_size
    return leases


def _grant_fitting(desk: Desk, call: Call, groups: list[Group], free: int) -> list[Lease]:
    """Whole groups only, in order; one that does not fit leaves room for a smaller one."""
    leases = []
    for group in groups:
        if len(group.missing()) <= free:
            leases.append(_lease(desk, group, call))
            free -= len(leases[-1].missing)
    return leases


def _num_new(desk: Desk, call: Call) -> int:
    """Prompts an actor may begin: what is wanted, within its share of it."""
    wanted = desk.num_wanted()
    num_open = len(desk.book.live) - desk.num_ready()
    held = len(desk.held_groups(call.actor, "train"))
    share = selection.fair_share(wanted, len(desk.fleet.alive(call.now)))
    return max(0, min(wanted - num_open, share - held))


def _dispatch(desk: Desk) -> Group | None:
    """The next prompt of the order as a new group; None when the order has ended for now."""
    state = desk.book.state
    if state.returned:
        head = state.returned[0]
        position, row, failures = head.position, head.row, head.failures
    else:
        if not _may_advance(desk):
            return None
        position, failures = state.cursor, 0
        row = desk.prompts.order.at(position)[1]
    event = ev.Dispatched(
        group_id=state.next_group_id,
        position=position,
        row=row,
        is_returned=bool(state.returned),
        failures=failures,
        group_size=desk.settings.group_size,
    )
    desk.emit(event)
    return state.groups[event.group_id]


def is_pass_used_up(desk: Desk) -> bool:
    """Every prompt of the passes opened so far was dispatched, and none is to be asked again."""
    state = desk.book.state
    return not state.returned and state.cursor >= state.passes * desk.prompts.order.num_rows


def _may_advance(desk: Desk) -> bool:
    if not is_pass_used_up(desk):
        return True
    if desk.settings.on_exhausted == "next_pass":
        open_pass(desk)
        return True
    return False


def open_pass(desk: Desk) -> None:
    """Go on with another pass, and say how the last one went."""
    state = desk.book.state
    desk.notices.append(
        f"pass {state.passes} over the {desk.prompts.order.num_rows} prompts is used up: since the "
        f"start {state.counters.get('groups_informative', 0)} groups were informative, "
        f"{state.counters.get('train_all_correct', 0)} all correct, "
        f"{state.counters.get('train_all_wrong', 0)} all wrong; of the last "
        f"{state.recent_groups:.0f} finished, {state.recent_informative:.0f} were informative."
    )
    desk.emit(ev.PassOpened())


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
        missing=tuple(_known(desk, group, index) for index in desk.book.unfilled(lease)),
        version=group.version,
        lease_s=desk.settings.lease_s,
    )


def _known(desk: Desk, group: Group, index: int) -> PartialResponse:
    """What is stored of an unfinished response."""
    chunks = group.partials.get(index, [])
    return join_chunks(index, [_read_chunk(desk, chunk) for chunk in chunks])


def _read_chunk(desk: Desk, chunk: Chunk) -> PartialResponse:
    part: PartialResponse = decode(desk.read_record(chunk.record_id), PartialResponse)
    return part


def join_chunks(index: int, parts: list[PartialResponse]) -> PartialResponse:
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
