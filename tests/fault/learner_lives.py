"""Lives of a learner that can be killed, fed by a buffer or by the tape of what it once gave.

Lives are forked from a process that has imported everything, so that one costs a fraction of a
second; SIGKILL hits the learner itself. Its disk is slow, so that writing a checkpoint takes long
enough to be hit.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from dapo_hpc import config as config_module
from dapo_hpc.buffer import messages as msg
from dapo_hpc.buffer.client import BufferClient
from dapo_hpc.config import RunConfig
from dapo_hpc.learner import checkpoint_files
from dapo_hpc.learner.parallel import Layout, connect
from dapo_hpc.learner.session import open_session
from dapo_hpc.learner.train import train
from dapo_hpc.records import Group, GroupSummary, Lease, PolicyVersion, Response, VersionSpan
from dapo_hpc.roles.startup import note_when_asked
from dapo_hpc.run_dir import RunDir
from tests.buffer_process import client_of, make_run
from tests.learner_parts import VOCAB, make_config, make_model

FSYNC_S = 0.01
"""What the slow disk adds to every fsync; a checkpoint has about ten."""
MAX_TOKENS = 15
WAIT_S = 120.0
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Life:
    """How one start of the learner differs from others."""

    root: Path
    """Its run directory is `root`/run."""
    total_steps: int
    tape: Path
    """Written when the buffer feeds this life, else read."""
    is_fed_by_buffer: bool = False
    layout: Layout = field(default_factory=Layout)
    is_async: bool = False
    """learner.async_checkpoint."""
    checkpoint_every: int = 1

    @property
    def run(self) -> RunDir:
        return RunDir(self.root / "run")

    @property
    def events(self) -> Path:
        return self.root / "events"

    def config(self) -> RunConfig:
        return make_config(
            self.root.parent / "model",
            self.root,
            run={"total_steps": self.total_steps},
            optimizer={"lr": 2e-3, "eps": 1e-3},
            learner={
                "checkpoint_every": self.checkpoint_every,
                "micro_batch_tokens": 96,
                "async_checkpoint": self.is_async,
                "tensor_parallel": self.layout.tensor,
                "pipeline_parallel": self.layout.pipeline,
                "data_parallel": self.layout.data,
            },
            buffer={"lease_s": 30.0, "heartbeat_s": 1.0, "request_timeout_s": 2.0},
        )

    def make(self) -> None:
        """The run directory, with what the buffer needs to start."""
        if not (self.root.parent / "model").exists():
            make_model(self.root.parent / "model")
        run = make_run(self.root, num_prompts=12)
        run.config.write_text(config_module.dump(self.config()))

    def start(self) -> list[BaseProcess]:
        """All ranks."""
        ranks = [FORKS.Process(target=live, args=(self, r)) for r in range(self.layout.world)]
        for rank in ranks:
            rank.start()
        return ranks

    def run_to_the_end(self) -> None:
        for rank in self.start():
            rank.join(WAIT_S)
            assert rank.exitcode == 0, self.log()

    def log(self) -> str:
        return (self.root / "learner.log").read_text()[-4000:]


def live(life: Life, rank: int) -> None:
    """One rank, from its start to the end of the run."""
    logging.basicConfig(
        filename=life.root / "learner.log", level=logging.INFO, format="%(process)d %(message)s"
    )
    is_asked = note_when_asked(signal.SIGUSR2)
    _slow_disk()
    address = life.root / "learner.json" if life.layout.world > 1 else None
    here = connect(life.layout, rank, address)
    buffer = Taped(life) if life.is_fed_by_buffer else Tape(life)
    try:
        train(open_session(life.run, life.config(), here, buffer, is_asked_to_leave=is_asked))
    except BaseException:
        logging.exception("this life ends")
        raise


def _slow_disk() -> None:
    real = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(FSYNC_S)
        real(descriptor)

    os.fsync = slow


# ------------------------------------------------------------------ what feeds it


class Taped(BufferClient):
    """The buffer; what it gives goes to the tape, and must be what it gave an earlier life."""

    def __init__(self, life: Life) -> None:
        super().__init__(life.run, request_timeout_s=2.0, give_up_s=30.0)
        self._life = life

    def register(self, step: int) -> int:
        note(self._life, f"register {step}")
        return super().register(step)

    def take(self, lineage: int, step: int, wait_s: float) -> msg.TakeReply:
        reply = super().take(lineage, step, wait_s)
        if reply.groups is not None:
            self._keep(f"step_{step}", msg.encode(reply.groups))
            note(self._life, f"take {step}")
        return reply

    def fetch(self, group_ids: list[int]) -> list[Group]:
        groups = super().fetch(group_ids)
        for group in groups:
            self._keep(f"group_{group.group_id}", msg.encode(group))
        return groups

    def _keep(self, name: str, content: bytes) -> None:
        path = self._life.tape / name
        if path.exists():
            note(self._life, f"replayed {name}")
            if path.read_bytes() != content:
                raise AssertionError(f"{name} is not what it was in an earlier life")
            return
        fresh = path.with_suffix(".new")
        fresh.write_bytes(content)
        fresh.rename(path)


class Tape:
    """Stands in for the buffer with what it gave another learner."""

    def __init__(self, life: Life) -> None:
        self._life = life

    def register(self, step: int) -> int:
        note(self._life, f"register {step}")
        return self._life.events.read_text().count("register")

    def take(self, lineage: int, step: int, wait_s: float) -> msg.TakeReply:
        del lineage, wait_s
        content = (self._life.tape / f"step_{step}").read_bytes()
        return msg.TakeReply(groups=msg.decode(content, list[GroupSummary]), metrics={})

    def fetch(self, group_ids: list[int]) -> list[Group]:
        paths = [self._life.tape / f"group_{id_}" for id_ in group_ids]
        return [msg.decode(path.read_bytes(), Group) for path in paths]

    def evaluations(self) -> msg.EvaluationsReply:
        return msg.EvaluationsReply(results=[], num_pending=0, versions_in_use=[])

    def publish(self, version: PolicyVersion, *, is_evaluated: bool) -> None: ...
    def commit(self, lineage: int, step: int) -> None: ...
    def finish(self, lineage: int) -> None: ...


def note(life: Life, event: str) -> None:
    with open(life.events, "a") as file:
        file.write(event + "\n")


class Actor(threading.Thread):
    """Answers whatever is leased with random tokens; every other response is right."""

    def __init__(self, run: RunDir) -> None:
        super().__init__(daemon=True)
        self._client = client_of(run, give_up_s=60)
        self._rng = np.random.default_rng(0)
        self.stopped = threading.Event()

    def run(self) -> None:
        version: PolicyVersion | None = None
        while not self.stopped.is_set():
            request = msg.LeaseRequest(
                actor="actor",
                version=version,
                max_responses=64,
                wait_s=0.2,
                stats=msg.ActorStats(),
            )
            reply = self._client.lease(request)
            if reply.is_done:
                return
            for lease in reply.leases:
                assert version is not None, "work comes to actors with weights"
                self._submit(lease, lease.version or version)
            version = reply.newest or version

    def _submit(self, lease: Lease, version: PolicyVersion) -> None:
        responses = [self._response(part.index, version) for part in lease.missing]
        done = msg.LeaseResponses(lease_id=lease.lease_id, responses=responses)
        self._client.submit(msg.SubmitRequest(actor="actor", leases=[done], stats=msg.ActorStats()))

    def _response(self, index: int, version: PolicyVersion) -> Response:
        count = int(self._rng.integers(1, MAX_TOKENS))
        is_correct = index % 2 == 0
        return Response(
            index=index,
            token_ids=self._rng.integers(3, VOCAB, count).astype(np.int32),
            rollout_logprobs=self._rng.normal(-3.5, 0.3, count).astype(np.float32),
            spans=(VersionSpan(start=0, version=version),),
            finish_reason="stop",
            is_correct=is_correct,
            reward=1.0 if is_correct else -1.0,
        )


# ------------------------------------------------------------------ killing it


def wait_until(is_reached: Any, ranks: list[BaseProcess], life: Life) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_reached():
        assert all(rank.is_alive() for rank in ranks), f"a life ended early:\n{life.log()}"
        assert time.monotonic() < deadline, f"nothing happens any more:\n{life.log()}"
        time.sleep(0.001)


def has_taken(life: Life, step: int) -> bool:
    """In any life so far."""
    return life.events.exists() and f"take {step}\n" in life.events.read_text()


def num_taken(life: Life) -> int:
    """Batches in all lives so far, replayed ones counted again."""
    return life.events.read_text().count("take ") if life.events.exists() else 0


def half_written(run: RunDir) -> list[int]:
    """Steps of checkpoints that are being written, or were when their writer was killed."""
    names = [path.name for path in run.checkpoints.glob(f"{checkpoint_files.TEMPORARY}step_*")]
    steps = [int(name.split("_")[1].split("-")[0]) for name in names]
    newest = max(checkpoint_files.steps_in(run.checkpoints), default=0)
    return [step for step in steps if step > newest]


def kill(ranks: list[BaseProcess]) -> None:
    """SIGKILL, as by a node's end."""
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.join(10)
