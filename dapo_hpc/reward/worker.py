"""A scoring process: reads one response at a time, answers whether it is correct.

Run as `python -m dapo_hpc.reward.worker FD PARENT_PID REWARD_SECTION_JSON` by `reward.pool`. It
imports neither torch nor vLLM, so it starts in a fraction of a second.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import msgspec

from dapo_hpc.config import RewardSection
from dapo_hpc.reward import protocol

PR_SET_PDEATHSIG = 1
READY = b"ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    text: str
    ground_truth: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    is_correct: bool
    error: str | None
    """What the scorer raised; the response then counts as wrong."""
    cpu_s: float
    """Processor time of this worker so far."""


def main() -> None:
    descriptor, parent_pid, section = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    _die_with(parent_pid)
    connection: Connection[bytes, bytes] = Connection(descriptor)
    scorer = protocol.resolve(RewardSection.model_validate_json(section))
    decoder, encoder = msgspec.msgpack.Decoder(Task), msgspec.msgpack.Encoder()
    connection.send_bytes(READY)
    while True:
        try:
            task = decoder.decode(connection.recv_bytes())
        except (EOFError, ConnectionError):
            return
        connection.send_bytes(encoder.encode(_outcome(scorer, task)))


def _outcome(scorer: protocol.Scorer, task: Task) -> Outcome:
    error = None
    try:
        is_correct = bool(scorer(task.text, task.ground_truth))
    except Exception as problem:  # the scorer is the user's: any error means "wrong", counted
        is_correct, error = False, f"{type(problem).__name__}: {problem}"
    return Outcome(is_correct=is_correct, error=error, cpu_s=time.process_time())


def _die_with(parent_pid: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit(1)


if __name__ == "__main__":
    main()
