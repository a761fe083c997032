"""One-shot role: data sets -> `prompts/train.parquet` and `prompts/eval.parquet`."""

from __future__ import annotations

import logging
import os

from dapo_hpc.config import RunConfig
from dapo_hpc.roles import startup
from dapo_hpc.run_dir import RunDir

_log = logging.getLogger(__name__)


def main(run: RunDir, config: RunConfig) -> int:
    """Prepare the prompts unless an earlier attempt of this run finished that."""
    if run.train_prompts.exists():
        _log.info("prompts are prepared already: %s", run.train_prompts)
        return 0
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    with startup.quick_start(), startup.without("torch"):
        from transformers import AutoTokenizer

        from dapo_hpc.prompts.prepare import prepare

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    for name, counts in prepare(run, config, tokenizer).items():
        _log.info("%s", counts.sentence(name))
    return 0
