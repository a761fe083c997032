"""Log lines of a role: time, level, role, message; and a failure that ends with its cause."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from dapo_hpc.observe.final import FINAL_EXIT, Final

FORMAT = "%(asctime)s %(levelname)s {role}: %(message)s"
ATTEMPT = "==="
TAIL_BYTES = 16_384
STEP_ENDED = re.compile(r"^slurmstepd\S* error: \*\*\* \S+ \S+ ON \S+ CANCELLED AT ")
"""Slurm's line below a role's last one, when the others of its step are ended too."""
_PREFIX = re.compile(r"^\d{2}:\d{2}:\d{2} [A-Z]+ [\w-]+: ")


def setup(role: str, *, level: int = logging.INFO) -> None:
    """Send this process's log to standard error; `role` may carry an index, as in actor-0."""
    logging.basicConfig(
        level=logging.WARNING, format=FORMAT.format(role=role), datefmt="%H:%M:%S", force=True
    )
    logging.getLogger("dapo_hpc").setLevel(level)


def exit_with_cause(error: BaseException) -> NoReturn:
    """Log the traceback, then one line with the cause, and end the process: FINAL_EXIT or 1."""
    logging.getLogger("dapo_hpc").error("".join(traceback.format_exception(error)).rstrip())
    logging.getLogger("dapo_hpc").critical("%s", cause_of(error))
    exit_at_once(FINAL_EXIT if isinstance(error, Final) else 1)


def exit_at_once(code: int) -> NoReturn:
    """End the process: what libraries print while they are torn down would follow its last line."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def cause_of(error: BaseException) -> str:
    """One line: the type unless the message is a sentence of our own (ValueError, Final)."""
    message = " ".join(str(error).split())
    if isinstance(error, ValueError | Final) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def message_of(line: str) -> str:
    """A log line without time, level and role."""
    return _PREFIX.sub("", line)


def attempt_header(name: str, attempt: int) -> str:
    """The line a launcher writes before each attempt of a process."""
    return f"{ATTEMPT} {name}, attempt {attempt}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n"


def begin_attempt(log: Path, name: str, attempt: int) -> None:
    """Append that line to a log, whatever the attempt before has left at its end."""
    with open(log, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(attempt_header(name, attempt).encode())


def last_line(log: Path) -> str:
    """Last line with text of a log file, whoever wrote it; '' without one."""
    return next(_lines_from_the_end(log), "")


def last_message(log: Path) -> str:
    """What the role itself said last in its present attempt; library chatter is left out."""
    for line in _lines_from_the_end(log):
        if _PREFIX.match(line):
            return message_of(line)
        if line.startswith(ATTEMPT):
            break
    return "starting"


def _lines_from_the_end(log: Path) -> Iterator[str]:
    """Lines with text in the last TAIL_BYTES, without Slurm's own last one; of a progress bar its
    last state."""
    if not log.exists():
        return
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    filled = (line.rstrip("\r").rpartition("\r")[2].strip() for line in reversed(lines))
    yield from (line for line in filled if line and not STEP_ENDED.match(line))
