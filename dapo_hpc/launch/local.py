"""All processes of a run on this machine: started, watched, restarted, stopped."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from dapo_hpc.config import RunConfig
from dapo_hpc.launch.process import RoleCommand, RoleProcess, role_words
from dapo_hpc.launch.supervise import Exit, Finish, GiveUp, Restart, RestartPolicy, exit_text
from dapo_hpc.observe.final import FINAL_EXIT
from dapo_hpc.observe.live import ProcessState, View
from dapo_hpc.observe.log import last_line, last_message, message_of
from dapo_hpc.run_dir import RunDir

TICK_S = 0.1
VIEW_S = 0.5
FINISH_S = 5.0
"""After the leader's exit 0 the others have learned that the run is complete; so long they get to
leave by themselves."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

COMPLETE, FAILED, INTERRUPTED = 0, 1, 130
"""Exit codes of the launcher."""


@dataclass(slots=True)
class StopRequest:
    """Counts Ctrl-C and its like; the second one cuts the waiting short."""

    count: int = 0

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch SIGINT, SIGTERM and SIGHUP while the context lasts."""
    request = StopRequest()
    before = {number: signal.signal(number, request) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(slots=True, kw_only=True)
class Fleet:
    """The processes of one stage of a run, until the leading unit is done or cannot go on."""

    commands: Sequence[RoleCommand]
    policy: RestartPolicy
    view: View
    request: StopRequest
    is_complete: Callable[[], bool]
    step: Callable[[], int]
    stop_s: float
    _live: dict[str, RoleProcess] = field(default_factory=dict)
    _attempts: dict[str, int] = field(default_factory=dict)
    _due_s: dict[str, float] = field(default_factory=dict)
    """Units waiting for their restart, with the time.monotonic() of it."""
    _viewed_s: float = 0.0

    def run(self) -> int:
        """Start everything and watch. Returns COMPLETE, FAILED or INTERRUPTED; nothing is left."""
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
            for unit in [u for u, due_s in self._due_s.items() if due_s <= time.monotonic()]:
                del self._due_s[unit]
                self._start(unit)
            self._show()
            time.sleep(TICK_S)
        self.view.say("Stopping: every process gets a moment to put its work away.")
        self._stop(self.stop_s)
        return INTERRUPTED

    def _exits(self) -> list[tuple[str, int]]:
        """Those that say they are final first: a rank that dies of another's death does not."""
        codes = [(name, process.exit_code()) for name, process in self._live.items()]
        ended = [(name, code) for name, code in codes if code is not None]
        return sorted(ended, key=lambda exit: exit[1] != FINAL_EXIT)

    def _on_exit(self, name: str, code: int) -> int | None:
        process = self._live.pop(name, None)
        if process is None:
            return None
        command = process.command
        cause = message_of(last_line(command.log))
        ended = Exit(unit=command.unit, process=name, code=code)
        decision = self.policy.decide(ended, is_complete=self.is_complete(), step=self.step())
        if command.unit in self.policy.preparing and decision == "wait":
            self._start_units_after(command.unit)
        if isinstance(decision, Finish):
            self._leave()
            return COMPLETE
        if isinstance(decision, Restart):
            self._restart_later(decision, f"{name} ended ({exit_text(code)}): {cause}")
        if isinstance(decision, GiveUp):
            self.view.say(_giving_up(decision, name, code, cause, command.log))
            self._stop(self.stop_s)
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
                self._live[command.name] = RoleProcess.start(command, attempt)

    def _leave(self) -> None:
        """The run is complete: wait for the others, then ask them, then insist."""
        self._wait(FINISH_S)
        self._stop(self.stop_s)

    def _stop(self, limit_s: float) -> None:
        for process in self._live.values():
            process.ask_to_stop()
        self._wait(limit_s)

    def _wait(self, limit_s: float) -> None:
        """Until every process has ended, the limit, or another stop request."""
        deadline_s = time.monotonic() + limit_s
        requests = self.request.count
        while self._live and time.monotonic() < deadline_s and self.request.count == requests:
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


def run_units(
    commands: Sequence[RoleCommand],
    *,
    leader: str,
    is_complete: Callable[[], bool],
    step: Callable[[], int],
    max_restarts: int,
    stop_s: float,
    view: View,
    request: StopRequest,
) -> int:
    """Run processes until those of unit `leader` are done.

    Args:
        commands: what to start, once each.
        leader: unit whose end is the end of all.
        is_complete: whether the leader's result is there; its exit 0 without it is a death.
        step: the furthest step that the run has reached.
        max_restarts: of each unit, without a further step in between.
        stop_s: processes that are asked to stop are killed after this long.
        view: what the person in front sees.
        request: stop requests.

    Returns:
        COMPLETE, FAILED (a unit died too often) or INTERRUPTED. Whichever it
        is, none of the processes is left.
    """
    sizes: dict[str, int] = {}
    for command in commands:
        sizes[command.unit] = sizes.get(command.unit, 0) + 1
    policy = RestartPolicy(
        leader=leader,
        sizes=sizes,
        max_restarts=max_restarts,
        preparing=frozenset(command.after for command in commands if command.after),
    )
    return Fleet(
        commands=commands,
        policy=policy,
        view=view,
        request=request,
        is_complete=is_complete,
        step=step,
        stop_s=stop_s,
    ).run()


# ------------------------------------------------------------------ which processes


def train_commands(run: RunDir, config: RunConfig) -> list[RoleCommand]:
    """Buffer, every learner rank, every actor."""
    return [*sampling_commands(run, config), *rank_commands(run, config, "learner")]


def sampling_commands(run: RunDir, config: RunConfig) -> list[RoleCommand]:
    """Buffer and actors; before the buffer, once in a run, the preparation of its prompts.

    Engines take longer to start than prompts to prepare, so both go on at the same time.
    """
    actors = [
        _command(run, "actor", f"actor-{i}", config.rollout.threads, "--index", str(i), index=i)
        for i in range(config.rollout.num_actors)
    ]
    buffer = _command(run, "buffer", "buffer", 1)
    if run.train_prompts.exists():
        return [buffer, *actors]
    prompts = _command(run, "prompts", "prompts", 1)
    return [prompts, replace(buffer, after=prompts.unit), *actors]


def rank_commands(run: RunDir, config: RunConfig, role: str) -> list[RoleCommand]:
    """Every rank of the learner, or of supervised fine-tuning; they restart together."""
    learner = config.learner
    model = learner.tensor_parallel * learner.pipeline_parallel
    world = model * learner.context_parallel * learner.data_parallel
    commands = []
    for rank in range(world):
        words = ("--rank", str(rank), "--world", str(world))
        commands.append(_command(run, role, role, learner.threads, *words, index=rank))
    return commands


def evaluate_command(run: RunDir, model: Path) -> RoleCommand:
    return _command(run, "evaluate", "evaluate", 1, "--model", str(model.absolute()))


def _command(
    run: RunDir, role: str, unit: str, threads: int, *words: str, index: int = 0
) -> RoleCommand:
    return RoleCommand(
        name=f"{unit}-{index}" if role in ("learner", "sft") else unit,
        unit=unit,
        words=role_words(role, run.root, *words),
        log=run.logs / f"{role}-local_{index}.log",
        threads=threads,
    )


def _giving_up(decision: GiveUp, name: str, code: int, cause: str, log: Path) -> str:
    count = decision.restarts
    times = f"after {count} restart{'s' * (count > 1)}" if count else "at its first start"
    why = "; another start would end the same way" if decision.is_final else ""
    return f"{name} ended ({exit_text(code)}) {times}{why}; the run stops.\n  {cause}\n  log: {log}"
