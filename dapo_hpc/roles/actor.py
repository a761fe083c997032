"""The actor: samples responses with vLLM, scores them, submits them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

from dapo_hpc.config import RunConfig
from dapo_hpc.run_dir import RunDir


def main(run: RunDir, config: RunConfig, index: int) -> int:
    """Run one actor until the run is done, or until SIGTERM asks it to drain.

    SIGINT is left to the launcher: an interrupted terminal signals all processes at once, and the
    launcher then drains them in order.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    from dapo_hpc.reward import protocol
    from dapo_hpc.rollout.engine import Engine, derived_seed

    protocol.resolve(config.reward)
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
