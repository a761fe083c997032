"""When a process ends: start it again, end the run, or call it complete. Rules only, no processes.

A unit is what restarts together: the buffer, one actor, or all ranks of the learner.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dapo_hpc.launch.process import RoleCommand
from dapo_hpc.observe.final import FINAL_EXIT, IDLE_EXIT

FIRST_DELAY_S = 1.0
MAX_DELAY_S = 30.0
QUIET_EXIT_DELAY_S = 5.0
"""After exit 0 of a unit that should have stayed: the run may be about to end."""

Unit = str


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """A process of a unit has ended."""

    unit: Unit
    process: str
    code: int
    """As subprocess has it: negative for a signal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    unit: Unit
    delay_s: float
    number: int
    """From 1; at most the policy's limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """Every process of the leading unit has exited 0 and the result is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    unit: Unit
    restarts: int
    is_final: bool = False
    """The process said that another start would end the same way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """The unit does not come back; the others go on."""

    unit: Unit
    is_idle: bool
    """It had no work; otherwise the run is complete."""


Decision = Restart | Finish | GiveUp | Leave | Literal["wait"]


@dataclass(slots=True, kw_only=True)
class RestartPolicy:
    """Counts deaths by unit and decides. The leading unit's exit 0 is the end of the run."""

    leader: Unit | None
    """None: units are equals, and leave one by one when the run is complete."""
    sizes: Mapping[Unit, int]
    """Processes of each unit."""
    max_restarts: int
    """Of each unit without progress of the run in between."""
    preparing: frozenset[Unit] = frozenset()
    """Units that do one thing and exit 0; another exit ends the run, since it is no accident."""
    quiet_delay_s: float = QUIET_EXIT_DELAY_S
    _restarts: dict[Unit, int] = field(default_factory=dict)
    _steps: dict[Unit, int] = field(default_factory=dict)
    """Steps the run had done when a unit died last."""
    _finished: int = 0
    """Processes of the leader that have exited 0 in its present life."""

    @classmethod
    def of(
        cls,
        commands: Sequence[RoleCommand],
        *,
        leader: Unit | None,
        max_restarts: int,
        quiet_delay_s: float = QUIET_EXIT_DELAY_S,
    ) -> RestartPolicy:
        """For exactly these processes."""
        return cls(
            leader=leader,
            sizes=Counter(command.unit for command in commands),
            max_restarts=max_restarts,
            preparing=frozenset(command.after for command in commands if command.after),
            quiet_delay_s=quiet_delay_s,
        )

    def decide(self, ended: Exit, *, is_complete: bool, step: int) -> Decision:
        """What to do about one exit. After Restart, further exits of that life are not reported.

        Args:
            ended: the exit.
            is_complete: the run's result is there; exit 0 of the leader without it is a death.
            step: the furthest step that the run has reached. A unit that dies over and over at the
                same step runs out of restarts; one that dies once a day never does.
        """
        if ended.unit in self.preparing:
            return "wait" if ended.code == 0 else GiveUp(unit=ended.unit, restarts=0)
        if ended.code == FINAL_EXIT:
            restarts = self._restarts.get(ended.unit, 0)
            return GiveUp(unit=ended.unit, restarts=restarts, is_final=True)
        is_idle = ended.code == IDLE_EXIT
        if self.leader is None and (is_idle or (ended.code == 0 and is_complete)):
            return Leave(unit=ended.unit, is_idle=is_idle)
        if ended.unit == self.leader and ended.code == 0:
            self._finished += 1
            if self._finished < self.sizes[self.leader]:
                return "wait"
            if is_complete:
                return Finish()
        if ended.unit == self.leader:
            self._finished = 0
        if step > self._steps.get(ended.unit, step):
            self._restarts[ended.unit] = 0
        self._steps[ended.unit] = step
        number = self._restarts.get(ended.unit, 0) + 1
        if number > self.max_restarts:
            return GiveUp(unit=ended.unit, restarts=self.max_restarts)
        self._restarts[ended.unit] = number
        delay_s = min(FIRST_DELAY_S * 2.0 ** (number - 1), MAX_DELAY_S)
        if ended.code == 0:
            delay_s = max(delay_s, self.quiet_delay_s)
        return Restart(unit=ended.unit, delay_s=delay_s, number=number)


def exit_text(code: int) -> str:
    """'exit 1' or 'killed by SIGKILL'."""
    if code >= 0:
        return f"exit {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"killed by {names.get(-code, f'signal {-code}')}"
