"""Bytes on disk, planned, against files that the learner writes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from dapo_hpc.config import load
from dapo_hpc.learner.checkpoint import Checkpoints, Progress
from dapo_hpc.learner.optimizer import AdamSettings, Optimizer
from dapo_hpc.learner.parallel import Processes
from dapo_hpc.plan.architecture import Architecture
from dapo_hpc.plan.disk import disk_use
from dapo_hpc.weights.publish import write_model as write_weights
from tests.unit.plan.measuring import architecture, build_policy, run_config, write_model

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
HEADERS = 0.02
"""Of the files: names and shapes, which weigh something in a model as small as this."""


def size_of(directory: Path, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in directory.rglob(pattern) if path.is_file())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_a_checkpoint_and_of_a_version(
    dtype: str, tied: bool, tmp_path: Path, here: Processes
) -> None:
    model = write_model(tmp_path / "model", tie_word_embeddings=tied, vocab_size=4001)
    config = run_config(model, dtype, freeze=["layers.0"])
    policy = build_policy(config, here)
    settings = AdamSettings(weight_decay=0.1, beta1=0.9, beta2=0.999, eps=1e-8, grad_clip=1.0)
    optimizer = Optimizer(policy, settings)
    Checkpoints(tmp_path / "checkpoints", here, keep=1).save(policy, optimizer, Progress(step=1))
    write_weights(tmp_path / "weights", policy.export(), model, 2**30)
    planned = disk_use(architecture(config), config)
    for found, plan in (
        (size_of(tmp_path / "checkpoints"), planned.checkpoint),
        (size_of(tmp_path / "weights", "*.safetensors"), planned.version),
    ):
        assert plan <= found <= plan * (1 + HEADERS)
    thawed = config.model_copy(update={"learner": config.learner.model_copy(update={"freeze": ()})})
    wrong = disk_use(architecture(config), thawed).checkpoint
    assert not wrong <= size_of(tmp_path / "checkpoints") <= wrong * (1 + HEADERS)


def test_what_lies_there_at_a_time() -> None:
    """Of Qwen2.5-32B: what is kept and the one that is being written."""
    config = load(CONFIGS / "qwen2.5_32b_dapo.toml")
    use = disk_use(Architecture.read(CONFIGS / "models" / "Qwen2.5-32B"), config)
    assert use.version == 2 * 32_763_876_352
    assert use.checkpoint == 14 * 32_763_876_352
    assert use.versions == (config.weights.keep_versions + 1) * use.version
    assert use.checkpoints == (config.learner.keep_checkpoints + 1) * use.checkpoint
    assert use.step_payload == 8192 * 20480 * 8
    # Checkpoints of steps 5 and 10 are kept until that of step 15 is durable: 6 to 15.
    assert use.payload == 10 * use.step_payload
    assert use.total == use.versions + use.checkpoints + use.payload
