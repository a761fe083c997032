"""Roles as steps of a Slurm job: the words of srun, and a running step as a process.

What srun does was tried on Slurm 22.05: SIGUSR2 to srun is handed to every task, without the
controller; SIGTERM to srun makes it kill the step; SIGKILL to srun leaves the tasks behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dapo_hpc.launch import slurm
from dapo_hpc.launch.lives import Place
from dapo_hpc.launch.process import RoleCommand, die_with
from dapo_hpc.observe.final import FINAL_EXIT
from dapo_hpc.observe.log import begin_attempt, last_line, message_of

SRUN_DEFAULTS = (
    "SLURM_CPUS_PER_TASK",
    "SLURM_DISTRIBUTION",
    "SLURM_EXPORT_ENV",
    "SLURM_GPUS",
    "SLURM_GPUS_PER_NODE",
    "SLURM_GPUS_PER_TASK",
    "SLURM_JOB_NUM_NODES",
    "SLURM_MEM_PER_CPU",
    "SLURM_MEM_PER_GPU",
    "SLURM_MEM_PER_NODE",
    "SLURM_NNODES",
    "SLURM_NPROCS",
    "SLURM_NTASKS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_TASKS_PER_NODE",
    "SRUN_CPUS_PER_TASK",
)
"""Variables of a batch job that srun would take for options; a step says itself what it needs."""
KILL_S = 10.0
"""srun waits 7 s for tasks it has killed."""
LOST_LINE = "CRITICAL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a step takes of the job's nodes."""

    first_node: int = 0
    """Place in the job's node list."""
    nodes: int = 1
    tasks_per_node: int = 1
    cpus_per_task: int = 1
    gpus_per_node: int = 0
    is_alone: bool = False
    """Its GPUs and cores belong to no other step of the job. Otherwise it shares all it uses, and
    sees no GPU."""

    def options(self) -> list[str]:
        """Of srun. The memory is the job's: a step that is given all of it limits no other."""
        words = [
            f"--nodes={self.nodes}",
            f"--ntasks={self.nodes * self.tasks_per_node}",
            f"--ntasks-per-node={self.tasks_per_node}",
            f"--cpus-per-task={self.cpus_per_task}",
            f"--relative={self.first_node}",
            "--distribution=block",
            "--mem=0",
            "--exact",
        ]
        gpus = self.gpus_per_node
        words.append(f"--gpus-per-node={gpus}" if gpus else "--gres=none")
        return words if self.is_alone else [*words, "--overlap"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCommand(RoleCommand):
    """A role that runs as a step; `log` is that of its first task."""

    logs: tuple[Path, ...]
    """One for each task, in the order of ranks."""
    final_mark: Path
    """Where a task writes why another start would end the same way: srun's exit code is the highest
    of all tasks, and a task that is ended because of another has a higher one."""


def step_command(
    *,
    name: str,
    role: str,
    share: Share,
    run_root: Path,
    arguments: tuple[str, ...],
    prefix: tuple[str, ...],
    log: str,
    threads: int,
    after: str = "",
) -> StepCommand:
    """The step of a role.

    Args:
        name: of the step and its unit, unique in the job.
        role: of `dapo role`.
        share: of the job's nodes.
        run_root: run directory, absolute.
        arguments: further ones of `dapo role`.
        prefix: words between srun's own and the role's, as of a container.
        log: name in the run's logs/, with %t for the number of the task.
        threads: OMP_NUM_THREADS.
        after: unit that must have exited 0 before.
    """
    logs = run_root / "logs"
    mark = run_root / "jobs" / f"final-{log.replace('_%t', '').removesuffix('.log')}"
    num_tasks = share.nodes * share.tasks_per_node
    words = (
        "srun",
        f"--job-name={name}",
        *share.options(),
        "--kill-on-bad-exit=1",
        "--export=ALL",
        "--input=none",
        "--open-mode=append",
        f"--output={str(logs).replace('%', '%%')}/{log}",
        *prefix,
        *_dapo(prefix),
        "role",
        role,
        "--run",
        str(run_root),
        f"--final-mark={mark}",
        *arguments,
    )
    paths = tuple(logs / log.replace("%t", str(task)) for task in range(num_tasks))
    return StepCommand(
        name=name,
        unit=name,
        words=words,
        log=paths[0],
        logs=paths,
        threads=threads,
        after=after,
        final_mark=mark,
    )


def _dapo(prefix: tuple[str, ...]) -> tuple[str, ...]:
    """Outside a container the interpreter of this process; inside, what is installed there."""
    return ("dapo",) if prefix else (sys.executable, "-m", "dapo_hpc.cli")


def srun_environment(environment: Mapping[str, str], threads: int) -> dict[str, str]:
    """What srun and the tasks see."""
    kept = {name: value for name, value in environment.items() if name not in SRUN_DEFAULTS}
    return {**kept, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def start_of(place: Place) -> str:
    """'job 7_0, start 2': which job, and its how manieth start by Slurm."""
    return f"job {place.address}, start {place.restart + 1}"


@dataclass(slots=True, kw_only=True)
class StepProcess:
    """A running step. srun speaks into the job's log, the role into its own."""

    command: StepCommand
    job_id: str
    srun: subprocess.Popen[bytes]
    started_s: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, command: RoleCommand, attempt: int, place: Place) -> StepProcess:
        """Call from the main thread: the kernel ends srun with the thread that started it."""
        assert isinstance(command, StepCommand), "a job starts steps"
        command.final_mark.unlink(missing_ok=True)
        for log in command.logs:
            begin_attempt(log, f"{command.name}, {start_of(place)}", attempt)
        srun = subprocess.Popen(
            command.words,
            stdin=subprocess.DEVNULL,
            env=srun_environment(os.environ, command.threads),
            start_new_session=True,
            preexec_fn=die_with(os.getpid()),
        )
        return cls(command=command, job_id=place.job_id, srun=srun)

    def exit_code(self) -> int | None:
        code = self.srun.poll()
        if code is None:
            return None
        if code < 0:
            self._end_tasks()
        return FINAL_EXIT if self.command.final_mark.exists() else code

    def cause(self) -> str:
        """Of the task that said it is final, else of the first that died of itself."""
        if self.command.final_mark.exists():
            return self.command.final_mark.read_text().strip()
        lines = [(log.stat().st_mtime, last_line(log)) for log in self.command.logs if log.exists()]
        fatal = sorted(line for line in lines if LOST_LINE in line[1])
        return message_of((fatal or lines or [(0.0, "")])[0][1])

    def ask_to_stop(self) -> None:
        """SIGUSR2 to every task."""
        if self.srun.poll() is None:
            self.srun.send_signal(signal.SIGUSR2)

    def wait_killed(self) -> None:
        """srun kills the tasks itself; if it does not come back, the controller is asked."""
        if self.srun.poll() is None:
            self.srun.terminate()
            try:
                self.srun.wait(KILL_S)
            except subprocess.TimeoutExpired:
                self._end_tasks()
                self.srun.kill()
                self.srun.wait()

    def _end_tasks(self) -> None:
        """Of a step without srun; nothing else would end them before the job does."""
        named = [step for step, name in slurm.steps(self.job_id) if name == self.command.name]
        slurm.cancel(named)
