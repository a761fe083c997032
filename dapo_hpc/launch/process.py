"""One role as an operating-system process: started so that it cannot outlive the launcher."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dapo_hpc.observe.log import begin_attempt, last_line, message_of

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleCommand:
    """What to run, and how it is called in logs and on the screen."""

    name: str
    """`buffer`, `actor-0`, `learner-1`: unique in the run."""
    unit: str
    """What it restarts together with; see launch.supervise."""
    words: tuple[str, ...]
    """Command line."""
    log: Path
    threads: int
    """OMP_NUM_THREADS."""
    after: str = ""
    """Unit that prepares something for this one: it starts when that one has exited 0."""


class Process(Protocol):
    """A running role, whatever started it."""

    @property
    def command(self) -> RoleCommand: ...
    @property
    def started_s(self) -> float: ...
    def exit_code(self) -> int | None:
        """None while it runs. Afterwards it has left nothing behind."""

    def cause(self) -> str:
        """Why it ended, in one line; once it has."""

    def ask_to_stop(self) -> None:
        """It puts its work away and exits 0."""

    def wait_killed(self) -> None:
        """End it and all that it started."""


@dataclass(slots=True, kw_only=True)
class RoleProcess:
    """A running role. Its output is appended to its log, under a line for each attempt."""

    command: RoleCommand
    popen: subprocess.Popen[bytes]
    started_s: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, command: RoleCommand, attempt: int) -> RoleProcess:
        """Start in a session of its own, killed by the kernel when this process dies.

        Call from the main thread: the kernel watches the thread that started the child.
        """
        begin_attempt(command.log, command.name, attempt)
        with open(command.log, "ab", buffering=0) as log:
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": str(command.threads),
                "PYTHONUNBUFFERED": "1",
            }
            popen = subprocess.Popen(
                command.words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=die_with(os.getpid()),
            )
        return cls(command=command, popen=popen)

    def exit_code(self) -> int | None:
        """None while it runs. Afterwards, whatever it left behind in its session is killed."""
        code = self.popen.poll()
        if code is not None:
            self.kill()
        return code

    def cause(self) -> str:
        return message_of(last_line(self.command.log))

    def ask_to_stop(self) -> None:
        """SIGTERM to the role alone; it tells its own children."""
        if self.popen.poll() is None:
            self.popen.terminate()

    def kill(self) -> None:
        """SIGKILL to the role and everything in its session's process group."""
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def wait_killed(self) -> None:
        """Kill and reap."""
        self.kill()
        self.popen.wait()


def role_words(role: str, run_root: Path, *arguments: str) -> tuple[str, ...]:
    """Command line of `dapo role`, for the interpreter of this process."""
    return (sys.executable, "-m", "dapo_hpc.cli", "role", role, "--run", str(run_root), *arguments)


def die_with(parent_pid: int) -> Callable[[], None]:
    """For a child to call before it becomes its program: the kernel kills it with its parent."""
    libc = ctypes.CDLL(None, use_errno=True)

    def in_child() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(1)

    return in_child
