"""The actor: samples responses with vLLM, scores them, submits them."""

from __future__ import annotations

import logging
import os
import socket
import time

from dapo_hpc.config import RunConfig
from dapo_hpc.observe.final import IDLE_EXIT
from dapo_hpc.roles import startup
from dapo_hpc.run_dir import RunDir

log = logging.getLogger(__name__)


def main(run: RunDir, config: RunConfig, index: int, idle_exit_s: float | None = None) -> int:
    """Run one actor until the run is done, it is asked to drain, or it had no work for long.

    Without work for `idle_exit_s`, or without a buffer for as long, it ends with IDLE_EXIT.
    """
    startup.leave_when_asked()
    with startup.quick_start():
        from dapo_hpc.reward import protocol
        from dapo_hpc.rollout.engine import Engine, derived_seed

        protocol.resolve(config.reward)
        # Before anything else that imports torch: it sets what torch and vLLM read at import.
        engine = Engine(config, seed=derived_seed(config.run.seed, index) % 2**31)

        from transformers import AutoTokenizer

        from dapo_hpc.buffer.client import BufferClient, BufferUnreachable
        from dapo_hpc.rollout.loop import ActorLoop

    buffer = BufferClient(
        run, request_timeout_s=config.buffer.request_timeout_s, give_up_s=idle_exit_s
    )
    loop = ActorLoop(
        name=_name(index),
        config=config,
        weights_dir=run.weights,
        engine=engine,
        tokenizer=AutoTokenizer.from_pretrained(config.model.path),
        buffer=buffer,
        idle_exit_s=idle_exit_s,
    )
    startup.call_when_asked(loop.drain)
    try:
        loop.run()
    except BufferUnreachable as error:
        if idle_exit_s is None:
            raise
        log.warning("%s No buffer is no work.", error)
        return IDLE_EXIT
    buffer.close()
    engine.close()
    return IDLE_EXIT if loop.is_idle else 0


def _name(index: int) -> str:
    """Never that of another life. Under Slurm it tells the job."""
    job = os.environ.get("SLURM_JOB_ID")
    place = f"job{job}-{socket.gethostname()}" if job else socket.gethostname()
    return f"actor-{index}-{place}-{os.getpid()}-{time.time_ns()}"
