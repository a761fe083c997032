"""The processes of a cluster: found by what they carry, never by name alone; started; killed.

A daemon carries MARK in its environment and hands it down to nothing but its slurmstepd. A process
of a job carries SLURM_CLUSTER_NAME, which Slurm sets. A slurmstepd has overwritten its environment
with its title; it is known by the files it has open.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.mini.shape import MiniRefused, Place

MARK = "DAPO_MINI_SLURM"
DAEMON = "DAPO_MINI_DAEMON"


@dataclass(frozen=True, kw_only=True)
class Process:
    pid: int
    command: str
    """Name of the program, 15 characters at most."""
    daemon: str | None
    """What it was started as: munged, slurmctld, slurmd-mn1, ...; None for a process of a job."""
    node: str | None


def processes(place: Place) -> list[Process]:
    """Every living process of the cluster, also those that nobody waits for any more."""
    return [found for pid in _pids() if (found := _process(pid, place)) is not None]


def daemon(place: Place, name: str) -> int | None:
    """Process id of a daemon, None where it does not run."""
    program = name.partition("-")[0]
    for found in processes(place):
        if found.daemon == name and found.command == program:
            return found.pid
    return None


def start(place: Place, name: str, words: Sequence[str], **environment: str) -> int:
    """Start a daemon in the background; it writes to log/NAME.out."""
    log = (place.log / f"{name}.out").open("ab")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    kept["PATH"] = f"{kept.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"
    marks = {MARK: str(place.root), DAEMON: name, "SLURM_CONF": str(place.conf)}
    with log:
        child = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=place.root,
            env=kept | marks | environment,
            start_new_session=True,
        )
    return child.pid


def kill(pids: Sequence[int], *, within_s: float = 10.0) -> None:
    """SIGKILL, and wait until they are gone; a zombie is gone.

    Raises:
        MiniRefused: one is still there, as with a process that waits for a dead disk.
    """
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        except PermissionError:
            raise MiniRefused(
                f"process {pid} of the mini cluster belongs to another user. Run this as root."
            ) from None
    deadline = time.monotonic() + within_s
    while left := [pid for pid in pids if is_alive(pid)]:
        _reap()
        if time.monotonic() > deadline:
            raise MiniRefused(f"processes {left} do not die of SIGKILL; the kernel holds them.")
        time.sleep(0.02)


def wait_for(
    what: str, condition: Callable[[], bool], *, within_s: float, needs: int | None = None
) -> None:
    """Poll a condition; `needs` is a process that it cannot come true without.

    Raises:
        MiniRefused: it did not come true in time, or the process has ended; begins with `what`.
    """
    deadline = time.monotonic() + within_s
    while not condition():
        _reap()
        if needs is not None and not is_alive(needs):
            raise MiniRefused(f"{what} It has ended.")
        if time.monotonic() > deadline:
            raise MiniRefused(f"{what} (waited {within_s:g} s)")
        time.sleep(0.05)


def stamp(pid: int) -> str:
    """`PID:START`, which no later process with the same number has."""
    return f"{pid}:{_stat(pid)[19]}"


def is_stamped_alive(text: str) -> bool:
    pid = int(text.partition(":")[0])
    return is_alive(pid) and stamp(pid) == text


def is_alive(pid: int) -> bool:
    """A zombie counts as dead: a container's first process may reap late or never."""
    try:
        return _stat(pid)[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _process(pid: int, place: Place) -> Process | None:
    try:
        if _stat(pid)[0] in "ZX":
            return None
        command = Path(f"/proc/{pid}/comm").read_text().strip()
        carried = _environment(pid)
        if carried.get(MARK) == str(place.root):
            name = carried.get(DAEMON, "")
            node = name.partition("-")[2] or None
            return Process(pid=pid, command=command, daemon=name, node=node)
        if carried.get("SLURM_CLUSTER_NAME") == place.cluster_name:
            node = carried.get("SLURMD_NODENAME")
            return Process(pid=pid, command=command, daemon=None, node=node)
        if command == "slurmstepd" and (log := _open_log(pid, place)):
            node = log.removeprefix("slurmd-").removesuffix(".log")
            return Process(pid=pid, command=command, daemon=None, node=node)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None  # ended while we looked, or another user's
    return None


def _open_log(pid: int, place: Place) -> str | None:
    """Name of the node's log that a slurmstepd writes to."""
    for number in Path(f"/proc/{pid}/fd").iterdir():
        target = Path(os.readlink(number))
        if target.parent == place.log and target.name.startswith("slurmd-"):
            return target.name
    return None


def _environment(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    return dict(line.partition("=")[::2] for line in text.split("\0") if "=" in line)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; index 19 is the start time in clock ticks."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _reap() -> None:
    """Collect our own children that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
