"""Roles without a model, for runs whose point is Slurm: `python -m tests.slurm.fake_roles WORDS`.

The prefix of a test's site file, so that the real supervisor starts real Slurm steps: it is given
the words of the real role. Actors and the learner are those of the campaign (tests/campaign), which
write down what they were told; the buffer is the real one.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from dapo_hpc.config import load
from dapo_hpc.observe.log import setup
from dapo_hpc.observe.metrics import MetricsLog
from dapo_hpc.run_dir import RunDir
from tests.campaign import sampler, trainer

ROUND_S = "FAKE_ROUND_S"
"""Variable: seconds of an actor's round, in which each of its responses gets 32 tokens."""
PLACES = "FAKE_PLACES"
"""Variable: responses that an actor samples at a time."""
FINISH = "finish"
"""File in the run directory: the learner ends the run after its next step."""


def main(words: Sequence[str]) -> None:
    role, run, index = parsed(words)
    if role not in ("actor", "learner"):
        os.execvp(words[0], words)
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, leave)
    (run.root / "history").mkdir(exist_ok=True)
    if role == "actor":
        sample(run, index)
    else:
        train(run)


def parsed(words: Sequence[str]) -> tuple[str, RunDir, int]:
    """Role, run and index, from the words that `dapo role` is given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--index", type=int, default=0)
    known, _ = parser.parse_known_args(words[words.index("role") + 1 :])
    return known.role, RunDir(known.run), known.index


def leave(_number: int, _frame: FrameType | None) -> None:
    """At once: leases run out, and a learner resumes from its checkpoint."""
    os._exit(0)


def sample(run: RunDir, index: int) -> None:
    setup(f"actor-{index}")
    sampler.ROUND_S = float(os.environ.get(ROUND_S, sampler.ROUND_S))
    sampler.PLACES = int(os.environ.get(PLACES, sampler.PLACES))
    job = f"{os.environ['SLURM_JOB_ID']}-{os.environ['SLURM_STEP_ID']}"
    sampler.main(run.root, f"actor-{index}-{job}", time.time_ns(), seed=0)


def train(run: RunDir) -> None:
    setup("learner-0")
    total_steps = load(run.config).run.total_steps
    trainer.main(
        run.root,
        time.time_ns(),
        lambda step, _: step >= total_steps or (run.root / FINISH).exists(),
        lambda lineage, step: MetricsLog(run.metrics, lineage=lineage).write("step", step, {}),
    )
    run.model.mkdir(exist_ok=True)


if __name__ == "__main__":
    main(sys.argv[1:])
