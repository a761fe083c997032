"""Prompts that kill the actors that sample them, told from prompts whose actors just went away.

An actor that dies says nothing: its leases expire, those of the guilty prompt and of its innocent
company alike, and a preempted actor looks the same. The rule (docs/buffer.md, "Poison prompts"):

* A lease is proven when it brought a token or a response. Losing an unproven lease is a death of
  its group; the first proof sets its deaths back to 0.
* From SUSPECT_DEATHS on a group is a suspect. It is leased only to an actor all of whose other
  leases are proven, and that actor gets nothing else until the suspect is proven. So each further
  death is the suspect's own, or chance.
* After SUSPECT_DEATHS + max_attempts deaths in a row the prompt is parked.
"""

from __future__ import annotations

from dapo_hpc.buffer.desk import Desk
from dapo_hpc.buffer.group import Group, LeaseRecord
from dapo_hpc.records import PolicyVersion

SUSPECT_DEATHS = 2
"""One death is common where actors are preempted; trials would cost more than they tell."""


def is_suspect(group: Group) -> bool:
    return group.deaths >= SUSPECT_DEATHS


def cleared(groups: list[Group]) -> list[Group]:
    """Those that may share an actor."""
    return [group for group in groups if not is_suspect(group)]


def lose(desk: Desk, lease: LeaseRecord) -> None:
    """The actor of a lease is silent."""
    group = desk.book.state.groups[lease.group_id]
    desk.end_lease(lease, "expired")
    park_if_due(desk, group)


def park_if_due(desk: Desk, group: Group) -> None:
    """Give a prompt up that failed, or lost its actor, too often."""
    limit = desk.settings.max_attempts
    if group.state != "open":
        return
    if group.failures >= limit:
        why = f"failed {group.failures} times (buffer.max_attempts = {limit})"
    elif group.deaths >= SUSPECT_DEATHS + limit:
        why = (
            f"lost {group.deaths} actors in a row before they sampled a token of it, the last "
            f"{limit} while it was on trial (buffer.max_attempts = {limit})"
        )
    else:
        return
    desk.drop_group(group, "parked")
    if group.kind == "train":  # it may be under way for a later pass too
        live = desk.book.index.live.values()
        for other in [x for x in live if x.row == group.row and x.state == "open"]:
            desk.drop_group(other, "parked")
    desk.notices.append(
        f"prompt of row {group.row} ({group.kind}) {why}; it is parked: no actor gets it again."
    )


def on_trial(desk: Desk, actor: str, version: PolicyVersion, now: float) -> list[Group] | None:
    """What suspects mean for an actor that asks; None: nothing, it is served like any other.

    []: it gets no lease now. [group]: it gets this suspect and nothing else.
    """
    groups = desk.book.state.groups
    unproven = [x for x in desk.live_leases(actor) if not x.is_proven]
    if any(is_suspect(groups[lease.group_id]) for lease in unproven):
        return []
    suspects = [group for group in _waiting(desk, version) if is_suspect(group)]
    if not suspects:
        return None
    if not unproven:
        return suspects[:1]
    # An engine that is always refilled has always something unproven: as many actors as there are
    # suspects get nothing new until they are ready for one.
    names = sorted(view.name for view in desk.fleet.present(now))
    return [] if actor in names[: len(suspects)] else None


def _waiting(desk: Desk, version: PolicyVersion) -> list[Group]:
    """Groups without a lease that an actor with these weights may sample."""
    is_current = version == desk.book.state.newest and version.step >= desk.oldest_step()
    return desk.waiting("eval", version) + (desk.waiting("train") if is_current else [])
