"""What can be found with one look. It follows from the state alone, and is rebuilt from it."""

from __future__ import annotations

import bisect

from dapo_hpc.buffer.forecast import Tally
from dapo_hpc.buffer.group import LIVE_STATES, Group


class Index:
    """Kept up to date by the book, around every change of a group."""

    def __init__(self) -> None:
        self.live: dict[int, Group] = {}
        """Open and ready training groups in dispatch order."""
        self.waiting: set[int] = set()
        """Groups of both kinds that nobody holds a lease on."""
        self.waiting_version = 0
        """Number of changes of that set or of a group in it."""
        self.tally = Tally()
        """Open training groups by what is known of them."""
        self.certain: list[int] = []
        """Sorted: live training groups that are ready or already hold both outcomes."""

    def add(self, group: Group) -> None:
        """A new group, or one of a state that is read back."""
        if group.kind == "train" and group.state in LIVE_STATES:
            self.live[group.group_id] = group
            self.count_open(group, 1)
        if group.is_waiting:
            self.start_waiting(group)

    def settle(self, group: Group) -> None:
        """Its state has changed for good; `count_open(group, -1)` came before."""
        self.note_certain(group)
        self.stop_waiting(group)
        if group.state not in LIVE_STATES:
            self.live.pop(group.group_id, None)

    def start_waiting(self, group: Group) -> None:
        self.waiting.add(group.group_id)
        self.waiting_version += 1

    def stop_waiting(self, group: Group) -> None:
        self.waiting.discard(group.group_id)
        self.waiting_version += 1

    def count_open(self, group: Group, amount: int) -> None:
        """Count an open training group in or out of the tally, before and after it changes."""
        if group.kind == "train" and group.state == "open":
            self.tally.add(len(group.responses), group.num_correct, amount)
        if amount > 0:
            self.note_certain(group)

    def note_certain(self, group: Group) -> None:
        """Keep the sorted list of the groups that a batch can count on."""
        if group.kind != "train":
            return
        is_mixed = 0 < group.num_correct < len(group.responses)
        is_certain = group.state == "ready" or (group.state == "open" and is_mixed)
        place = bisect.bisect_left(self.certain, group.group_id)
        is_noted = place < len(self.certain) and self.certain[place] == group.group_id
        if is_certain and not is_noted:
            self.certain.insert(place, group.group_id)
        elif is_noted and not is_certain:
            del self.certain[place]
