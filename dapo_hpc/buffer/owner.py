"""One owner at a time, without file locks: the owner of a buffer is its highest `owner.<n>`.

`link(2)` creates a name or fails, on every file system; flock may be switched off on a cluster's. A
successor takes the next number; the predecessor looks for a higher one before and after each group
commit, and never acknowledges once there is one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from dapo_hpc.buffer.ledger import FILE as LEDGER_FILE
from dapo_hpc.run_dir import fsync_directory

log = logging.getLogger(__name__)

GRACE_FRAC = 1.25
"""A successor waits this multiple of the clients' time-out: then nobody listens to the predecessor
any more."""


class OwnerFenced(Exception):
    """Another buffer process owns this run now: exit without another acknowledgement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIdentity:
    """Names one life of one process on one boot of one host."""

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    start_ticks: int
    """Field 22 of /proc/<pid>/stat."""

    @classmethod
    def own(cls) -> ProcessIdentity:
        return cls(
            host=socket.gethostname(),
            boot_id=_boot_id(),
            pid_namespace=os.readlink("/proc/self/ns/pid"),
            pid=os.getpid(),
            start_ticks=_start_ticks(os.getpid()) or 0,
        )

    def is_provably_dead(self) -> bool:
        """True only where this process would be visible if it lived."""
        if self.boot_id != _boot_id() or self.pid_namespace != os.readlink("/proc/self/ns/pid"):
            return False
        return _start_ticks(self.pid) != self.start_ticks


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_ticks(pid: int) -> int | None:
    """None when there is no such process, or only its zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


@dataclass(frozen=True, slots=True)
class Ownership:
    """This process owns the buffer as `incarnation`, until somebody takes the next number."""

    directory: Path
    incarnation: int

    def check(self) -> None:
        """Raises OwnerFenced when there is a newer owner."""
        if _owner_path(self.directory, self.incarnation + 1).exists():
            raise OwnerFenced(
                f"this buffer is incarnation {self.incarnation} of {self.directory}, but "
                f"incarnation {self.incarnation + 1} has taken over; exiting without another "
                "acknowledgement."
            )

    @property
    def ledger(self) -> Path:
        """Ledger and segments of this incarnation."""
        return _ledger_path(self.directory, self.incarnation)


def take_ownership(directory: Path) -> Ownership:
    """Become the newest owner. Raises OwnerFenced when another process is faster."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    incarnation = max(_numbers(directory, "owner"), default=0) + 1
    temporary = directory / f".owner.{incarnation}.{os.getpid()}"
    with open(temporary, "w") as file:
        json.dump(asdict(ProcessIdentity.own()), file)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, _owner_path(directory, incarnation))
    except FileExistsError:
        raise OwnerFenced(
            f"another process became incarnation {incarnation} of {directory} at the same moment; "
            "it serves the run. Exit."
        ) from None
    finally:
        temporary.unlink()
    fsync_directory(directory)
    return Ownership(directory, incarnation)


def inherit_ledger(
    owner: Ownership, request_timeout_s: float, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Copy the newest ledger and link its segments, once nobody listens to a predecessor."""
    source = _newest_ledger(owner)
    rivals = [n for n in _numbers(owner.directory, "owner") if source <= n < owner.incarnation]
    alive = [n for n in rivals if not _identity(owner.directory, n).is_provably_dead()]
    if alive:
        wait_s = GRACE_FRAC * request_timeout_s
        log.warning(
            "incarnation %s may still run; waiting %.1f s until no client listens to it.",
            alive[-1], wait_s,
        )  # fmt: skip
        sleep(wait_s)
        owner.check()
    while True:
        source = _newest_ledger(owner)
        temporary = _copy_ledger(owner, source)
        if _newest_ledger(owner) == source:  # else a rival may have removed what was just copied
            break
    os.rename(temporary, owner.ledger)
    fsync_directory(owner.directory)


def _newest_ledger(owner: Ownership) -> int:
    """Of a predecessor; 0: there is none."""
    numbers = _numbers(owner.directory, "ledger")
    return max((n for n in numbers if n < owner.incarnation), default=0)


def _copy_ledger(owner: Ownership, source: int) -> Path:
    temporary = owner.directory / f".ledger.{owner.incarnation}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700)
    if source:
        _link_segments(_ledger_path(owner.directory, source), temporary)
        for file in sorted(_ledger_path(owner.directory, source).glob(f"{LEDGER_FILE}*")):
            shutil.copyfile(file, temporary / file.name)
            with open(temporary / file.name, "rb") as copied:
                os.fsync(copied.fileno())
        _link_segments(_ledger_path(owner.directory, source), temporary)
    fsync_directory(temporary)
    return temporary


def _link_segments(source: Path, target: Path) -> None:
    """Names of our own for the same files: what a predecessor deletes is still there.

    Before the ledger is copied, because a predecessor that is cut off but not dead may end one
    group commit and delete what the copy still needs; and after it, because that commit may have
    begun a file.
    """
    for file in source.glob("*.seg"):
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            os.link(file, target / file.name)


def remove_old_ledgers(owner: Ownership) -> None:
    """Keep this incarnation's ledger, and of the one before it all but the segments."""
    for number in [n for n in _numbers(owner.directory, ".ledger") if n < owner.incarnation]:
        shutil.rmtree(owner.directory / f".ledger.{number}", ignore_errors=True)
    older = [n for n in sorted(_numbers(owner.directory, "ledger")) if n < owner.incarnation]
    for number in older[:-1]:
        shutil.rmtree(_ledger_path(owner.directory, number), ignore_errors=True)
    for file in _ledger_path(owner.directory, older[-1]).glob("*.seg") if older else ():
        file.unlink(missing_ok=True)


def _identity(directory: Path, incarnation: int) -> ProcessIdentity:
    return ProcessIdentity(**json.loads(_owner_path(directory, incarnation).read_text()))


def _owner_path(directory: Path, incarnation: int) -> Path:
    return directory / f"owner.{incarnation}"


def _ledger_path(directory: Path, incarnation: int) -> Path:
    return directory / f"ledger.{incarnation}"


def _numbers(directory: Path, kind: str) -> list[int]:
    suffixes = (path.name.rpartition(".")[2] for path in directory.glob(f"{kind}.*"))
    return [int(suffix) for suffix in suffixes if suffix.isdigit()]
