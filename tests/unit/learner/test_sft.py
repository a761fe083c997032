"""Supervised fine-tuning learns, resumes to the same bits, and leaves a finished model alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from safetensors.torch import load_file

from dapo_hpc.config import RunConfig, SftSection
from dapo_hpc.learner import sft
from dapo_hpc.learner.parallel import Processes
from dapo_hpc.observe import metrics
from dapo_hpc.run_dir import RunDir
from tests.learner_parts import make_config

NUM_STEPS, BATCH = 60, 16


@pytest.fixture
def init(tiny_model: Path, tmp_path: Path) -> Path:
    """Config and tokenizer of the shared tiny model, without its weights."""
    directory = tmp_path / "init"
    directory.mkdir()
    for path in tiny_model.iterdir():
        if path.suffix != ".safetensors":
            (directory / path.name).write_bytes(path.read_bytes())
    return directory


def prepare(init: Path, root: Path, **overrides: Any) -> tuple[RunDir, RunConfig]:
    """Pairs `d=` -> the next digit: one token of answer and the end token."""
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 10, NUM_STEPS * BATCH)
    root.mkdir(exist_ok=True)
    pairs = root / "pairs.parquet"
    table = {
        "prompt": [f"{d}=" for d in digits],
        "response": [f"{(d + 1) % 10}" for d in digits],
    }
    pq.write_table(pa.table(table), pairs)
    section = {
        "init": str(init),
        "pairs": str(pairs),
        "batch_size": BATCH,
        "lr": 1e-2,
        "warmup_steps": 5,
        "checkpoint_every": 20,
        **overrides,
    }
    config = make_config(root / "trained", root, sft=section)
    config.run_dir.mkdir(parents=True)
    return RunDir(config.run_dir), config


def test_it_learns_a_mapping_and_transformers_loads_it(
    init: Path, here: Processes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, config = prepare(init, tmp_path)
    sft.fine_tune(run, config, here)
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model.path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.path)
    prompts = tokenizer([f"{d}=" for d in range(10)], return_tensors="pt")
    with torch.no_grad():
        first = model(**prompts).logits[:, -1].argmax(-1)
    assert tokenizer.convert_ids_to_tokens(first.tolist()) == [f"{(d + 1) % 10}" for d in range(10)]

    rows = metrics.read(run.metrics, "sft")
    assert [row["step"] for row in rows] == list(range(10, NUM_STEPS + 1, 10))
    assert rows[0]["sft/loss"] > 1.0
    assert rows[-1]["sft/loss"] < 0.05

    with caplog.at_level(logging.INFO):
        sft.fine_tune(run, config, here)
    assert "not trained again" in caplog.text
    assert metrics.read(run.metrics, "sft") == rows


def test_first_loss_is_that_of_transformers(
    tiny_model: Path, here: Processes, tmp_path: Path
) -> None:
    """Mean over the response tokens of the batch, the end token included."""
    run, config = prepare(tiny_model, tmp_path)
    assert config.sft is not None
    pairs = sft.Pairs(config.sft)
    policy, optimizer = sft._build(config, config.sft, here)
    batch = pairs.batch(0)
    found = sft.update(policy, optimizer, sft.pack_batch(policy, batch, 20), lr=0.0)

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).float()
    losses = []
    for prompt, response in batch:
        ids = torch.tensor(prompt + response)
        distribution = torch.log_softmax(model(ids[None]).logits[0], -1)
        losses.append(-distribution[:-1].gather(1, ids[1:, None])[len(prompt) - 1 :, 0])
    assert float(found) == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert batch[0][1][-1] == transformers.AutoTokenizer.from_pretrained(tiny_model).eos_token_id


class Crash(Exception):
    pass


def test_a_crashed_run_ends_with_the_same_bits(
    init: Path, here: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = prepare(init, tmp_path / "straight")
    sft.fine_tune(run, config, here)
    straight = load_file(Path(config.model.path) / "model.safetensors")

    run, config = prepare(init, tmp_path / "broken")
    real, calls = sft.update, []

    def crashes_at_31(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 31:
            raise Crash
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "update", crashes_at_31)
        with pytest.raises(Crash):
            sft.fine_tune(run, config, here)
        sft.fine_tune(run, config, here)
    assert len(calls) == 31 + NUM_STEPS - 20, "it resumed after step 20"
    broken = load_file(Path(config.model.path) / "model.safetensors")
    assert all(torch.equal(straight[name], broken[name]) for name in straight)


def test_learning_rate_rises_holds_and_falls() -> None:
    section = SftSection(init="x", pairs="x", lr=1.0, warmup_steps=4, final_lr_frac=0.2)
    rates = [sft.learning_rate(section, step, 20) for step in (1, 4, 10, 15, 20)]
    assert rates == pytest.approx([0.25, 1.0, 1.0, 0.6, 0.2])


def test_too_few_pairs_are_an_error(init: Path, tmp_path: Path) -> None:
    _, config = prepare(init, tmp_path, batch_size=NUM_STEPS * BATCH + 1)
    assert config.sft is not None
    with pytest.raises(ValueError, match=r"sft\.batch_size = 961"):
        sft.Pairs(config.sft)
