"""The processes of one stage of a run: started, watched, restarted, stopped in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from dapo_hpc.launch.process import Process, RoleCommand
from dapo_hpc.launch.supervise import (
    Exit,
    Finish,
    GiveUp,
    Leave,
    Restart,
    RestartPolicy,
    exit_text,
)
from dapo_hpc.observe.final import FINAL_EXIT
from dapo_hpc.observe.live import ProcessState, View
from dapo_hpc.observe.log import last_message

TICK_S = 0.1
VIEW_S = 0.5
FINISH_S = 5.0
"""After the leader's exit 0 the others have learned that the run is complete; so long they get to
leave by themselves."""

COMPLETE, FAILED, INTERRUPTED = 0, 1, 130
"""How a fleet ends: the result is there; a unit died too often; a stop request. Exit codes of the
local launcher."""
IDLE, LEFT = 4, 5
"""Nothing runs any more because there was no work, or because somebody else asked all to leave."""


class Request(Protocol):
    """Somebody's wish that all processes leave."""

    @property
    def count(self) -> int:
        """Of wishes so far; one more while they leave cuts the waiting short."""


@dataclass(slots=True)
class StopRequest:
    """Counts Ctrl-C and its like; the second one cuts the waiting short."""

    count: int = 0

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Who is asked to stop together, and killed together when the time is up."""

    limit_s: float
    units: frozenset[str] | None = None
    """None: every one that still runs."""

    def has(self, unit: str) -> bool:
        return self.units is None or unit in self.units


@dataclass(slots=True, kw_only=True)
class Fleet:
    """The processes of one stage of a run, until the leading unit is done or cannot go on."""

    commands: Sequence[RoleCommand]
    start: Callable[[RoleCommand, int], Process]
    """(what, its attempt from 1) -> the running process."""
    policy: RestartPolicy
    view: View
    request: Request
    is_complete: Callable[[], bool]
    step: Callable[[], int]
    stages: Sequence[Stage]
    """Of stopping, in order."""
    finish_s: float = FINISH_S
    watch: Callable[[], None] = lambda: None
    """Called at every tick; may raise a stop request."""
    core: frozenset[str] = frozenset()
    """Units that never exit 0 unless they are asked. Once all of them have, and we did not ask,
    somebody else did. Empty: an exit 0 is an accident."""
    cause: str = ""
    """Why it failed."""
    _live: dict[str, Process] = field(default_factory=dict)
    _attempts: dict[str, int] = field(default_factory=dict)
    _due_s: dict[str, float] = field(default_factory=dict)
    """Units waiting for their restart, with the time.monotonic() of it."""
    _quiet: set[str] = field(default_factory=set)
    """Units waiting for their restart after an exit 0."""
    _left: dict[str, Leave] = field(default_factory=dict)
    """Units that do not come back."""
    _viewed_s: float = 0.0

    def run(self) -> int:
        """Start everything and watch. Returns one of the ends above; nothing is left running."""
        try:
            self._start_units_after("")
            return self._watch()
        finally:
            for process in self._live.values():
                process.wait_killed()

    def _watch(self) -> int:
        while not self.request.count:
            for name, code in self._exits():
                outcome = self._on_exit(name, code)
                if outcome is not None:
                    return outcome
            if self.core and self.core <= self._quiet | self._left.keys():
                self.stop()
                return self._end_of_the_core()
            for unit in [u for u, due_s in self._due_s.items() if due_s <= time.monotonic()]:
                del self._due_s[unit]
                self._quiet.discard(unit)
                self._start(unit)
            self._show()
            self.watch()
            time.sleep(TICK_S)
        self.view.say("Stopping: every process gets a moment to put its work away.")
        self.stop()
        return INTERRUPTED

    def _end_of_the_core(self) -> int:
        if self._quiet & self.core:
            return LEFT
        return IDLE if any(leave.is_idle for leave in self._left.values()) else COMPLETE

    def _exits(self) -> list[tuple[str, int]]:
        """Those that say they are final first: a rank that dies of another's death does not."""
        codes = [(name, process.exit_code()) for name, process in self._live.items()]
        ended = [(name, code) for name, code in codes if code is not None]
        return sorted(ended, key=lambda exit: exit[1] != FINAL_EXIT)

    def _on_exit(self, name: str, code: int) -> int | None:
        process = self._live.pop(name, None)
        if process is None:
            return None
        command, cause = process.command, process.cause()
        ended = Exit(unit=command.unit, process=name, code=code)
        decision = self.policy.decide(ended, is_complete=self.is_complete(), step=self.step())
        if command.unit in self.policy.preparing and decision == "wait":
            self._start_units_after(command.unit)
        if isinstance(decision, Finish):
            self._leave()
            return COMPLETE
        if isinstance(decision, Leave):
            self._left[command.unit] = decision
            self.view.say(f"{name} ended ({exit_text(code)}) and stays away: {cause}")
        if isinstance(decision, Restart):
            self._restart_later(decision, f"{name} ended ({exit_text(code)}): {cause}")
            if code == 0:
                self._quiet.add(command.unit)
        if isinstance(decision, GiveUp):
            self.cause = _giving_up(decision, command, code, cause)
            self.view.say(self.cause)
            self.stop()
            return FAILED
        return None

    def _restart_later(self, decision: Restart, what: str) -> None:
        for name in [n for n, p in self._live.items() if p.command.unit == decision.unit]:
            self._live.pop(name).wait_killed()
        self._due_s[decision.unit] = time.monotonic() + decision.delay_s
        limit = self.policy.max_restarts
        self.view.say(f"{what}\n  restart {decision.number} of {limit} in {decision.delay_s:.0f} s")

    def _start_units_after(self, prepared: str) -> None:
        for unit in dict.fromkeys(c.unit for c in self.commands if c.after == prepared):
            self._start(unit)

    def _start(self, unit: str) -> None:
        for command in self.commands:
            if command.unit == unit:
                attempt = self._attempts.get(command.name, 0) + 1
                self._attempts[command.name] = attempt
                self._live[command.name] = self.start(command, attempt)

    def _leave(self) -> None:
        """The run is complete: wait for the others, then ask them, then insist."""
        self._wait(Stage(limit_s=self.finish_s))
        self.stop()

    def stop(self) -> None:
        """Ask everybody, stage by stage; those that stay longer than their stage are killed."""
        for stage in self.stages:
            for process in self._of(stage):
                process.ask_to_stop()
            self._wait(stage)
            for process in self._of(stage):
                process.wait_killed()
                del self._live[process.command.name]

    def _of(self, stage: Stage) -> list[Process]:
        return [process for process in self._live.values() if stage.has(process.command.unit)]

    def _wait(self, stage: Stage) -> None:
        """Until every process of the stage has ended, its limit, or another stop request."""
        deadline_s = time.monotonic() + stage.limit_s
        requests = self.request.count
        while (
            self._of(stage)
            and time.monotonic() < deadline_s
            and self.request.count == requests
        ):  # fmt: skip
            for name, _ in self._exits():
                del self._live[name]
            self._show()
            time.sleep(TICK_S)

    def _show(self) -> None:
        if time.monotonic() - self._viewed_s < VIEW_S:
            return
        self._viewed_s = time.monotonic()
        self.view.update([self._state(command) for command in self.commands])

    def _state(self, command: RoleCommand) -> ProcessState:
        process = self._live.get(command.name)
        return ProcessState(
            name=command.name,
            is_running=process is not None,
            age_s=time.monotonic() - process.started_s if process else 0.0,
            message=last_message(command.log),
        )


def _giving_up(decision: GiveUp, command: RoleCommand, code: int, cause: str) -> str:
    count, name = decision.restarts, command.name
    times = f"after {count} restart{'s' * (count > 1)}" if count else "at its first start"
    why = "; another start would end the same way" if decision.is_final else ""
    return (
        f"{name} ended ({exit_text(code)}) {times}{why}; the run stops.\n  {cause}\n"
        f"  log: {command.log}"
    )
