"""Evaluation without a learner: a model directory becomes version 0, and the actors try it."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dapo_hpc.config import RunConfig
from dapo_hpc.run_dir import RunDir, write_json

if TYPE_CHECKING:
    from torch import Tensor

POLL_S = 0.5

log = logging.getLogger(__name__)


def main(run: RunDir, config: RunConfig, model: Path) -> int:
    """Hand `model` to the actors, write down the accuracy they find, and end the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

    from dapo_hpc.buffer.client import BufferClient
    from dapo_hpc.observe.metrics import MetricsLog
    from dapo_hpc.records import PolicyVersion
    from dapo_hpc.weights.publish import publish

    buffer = BufferClient(run, request_timeout_s=config.buffer.request_timeout_s)
    version = PolicyVersion(step=0, lineage=buffer.register(0))
    tensors = model_tensors(model, config.model.dtype)
    publish(run.weights, version, tensors, [], model, config.weights.save_shard_bytes)
    buffer.publish(version, is_evaluated=True)
    log.info("%s is handed out as %s; waiting for the actors.", model, version.name)
    while not (results := [r for r in buffer.evaluations().results if r.version == version]):
        time.sleep(POLL_S)
    row = {
        "eval/accuracy": results[0].accuracy,
        "eval/pass_at_k": results[0].pass_at_k,
        "eval/response_tokens_mean": results[0].mean_tokens,
    }
    run.eval.mkdir(exist_ok=True)
    write_json(run.eval / f"{version.name}.json", asdict(results[0]))
    MetricsLog(run.metrics, lineage=version.lineage).write("eval", 0, row)
    buffer.finish(version.lineage)
    buffer.close()
    return 0


def model_tensors(model: Path, dtype: str) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every safetensors file of a model, in the dtype of the run."""
    import torch
    from safetensors import safe_open

    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{model} holds no safetensors files; expected a Hugging Face model.")
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name).to(getattr(torch, dtype))
