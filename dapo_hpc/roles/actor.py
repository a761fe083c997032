"""The actor: samples responses with vLLM, scores them, submits them."""

from __future__ import annotations

import os
import signal
import socket
import time

from dapo_hpc.config import RunConfig
from dapo_hpc.roles import startup
from dapo_hpc.run_dir import RunDir


def main(run: RunDir, config: RunConfig, index: int) -> int:
    """Run one actor until the run is done, or until SIGTERM asks it to drain."""
    startup.leave_when_asked()
    with startup.quick_start():
        from dapo_hpc.reward import protocol
        from dapo_hpc.rollout.engine import Engine, derived_seed

        protocol.resolve(config.reward)
        # Before anything else that imports torch: it sets what torch and vLLM read at import.
        engine = Engine(config, seed=derived_seed(config.run.seed, index) % 2**31)

        from transformers import AutoTokenizer

        from dapo_hpc.buffer.client import BufferClient
        from dapo_hpc.rollout.loop import ActorLoop

    buffer = BufferClient(run, request_timeout_s=config.buffer.request_timeout_s)
    loop = ActorLoop(
        name=f"actor-{index}-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}",
        config=config,
        weights_dir=run.weights,
        engine=engine,
        tokenizer=AutoTokenizer.from_pretrained(config.model.path),
        buffer=buffer,
    )
    signal.signal(signal.SIGTERM, lambda *_: loop.drain())
    loop.run()
    buffer.close()
    engine.close()
    return 0
