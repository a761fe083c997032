"""All processes of a run on this machine: started, watched, restarted, stopped."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from dapo_hpc.config import RunConfig
from dapo_hpc.launch.fleet import COMPLETE as COMPLETE
from dapo_hpc.launch.fleet import FAILED as FAILED
from dapo_hpc.launch.fleet import INTERRUPTED as INTERRUPTED
from dapo_hpc.launch.fleet import Fleet, Stage
from dapo_hpc.launch.fleet import StopRequest as StopRequest
from dapo_hpc.launch.process import RoleCommand, RoleProcess, role_words
from dapo_hpc.launch.supervise import RestartPolicy
from dapo_hpc.observe.live import View
from dapo_hpc.run_dir import RunDir

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
    policy = RestartPolicy.of(commands, leader=leader, max_restarts=max_restarts)
    return Fleet(
        commands=commands,
        start=RoleProcess.start,
        policy=policy,
        view=view,
        request=request,
        is_complete=is_complete,
        step=step,
        stages=[Stage(limit_s=stop_s)],
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
