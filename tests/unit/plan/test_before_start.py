"""`dapo train` and `dapo sft` ask the plan first: every problem at once, and nothing is created."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dapo_hpc import cli
from dapo_hpc.config import load
from dapo_hpc.launch import session
from dapo_hpc.plan import make_plan, sft_phase
from dapo_hpc.plan.memory import GIB

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
DEMO = CONFIGS / "demo.toml"
SMALL = CONFIGS / "models" / "Qwen2.5-7B"


def options(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A model without weights, its prompts and pairs, and where runs would lie."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((SMALL / "config.json").read_text())
    for name in ("train", "eval", "pairs"):
        (tmp_path / name).touch()
    return options(
        f"run.dir={tmp_path}/runs",
        f"model.path={tmp_path}/model",
        f"prompts.train={tmp_path}/train",
        f"prompts.eval={tmp_path}/eval",
        f"sft.init={tmp_path}/model",
        f"sft.pairs={tmp_path}/pairs",
    )


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = cli.main(list(words))
    return code, capsys.readouterr().err


def test_problems_of_the_plan_and_missing_files_come_at_once(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = (
        f"prompts.train={tmp_path}/none",
        "learner.tensor_parallel=3",
        "learner.pipeline_parallel=3",
        "rollout.max_response_tokens=200000",
    )
    before = sorted(path.name for path in tmp_path.iterdir())
    code, err = said(capsys, "train", str(DEMO), *files, *options(*wrong))
    assert code == 2
    lines = err.splitlines()
    assert all(line.startswith("demo.toml: ") for line in lines)
    for words in (
        "none': there is no such file or directory",
        "does not divide the 28 layers",
        "does not divide num_attention_heads = 28",
        "max_position_embeddings",
        "rollout.cpu_cache_gib = 1 holds",
    ):
        assert any(words in line for line in lines), words
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_gpu_that_is_too_small_starts_nothing(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus = options("hardware.gpus_per_node=8", "hardware.gpu_memory_gib=40", "model.dtype=bfloat16")
    code, err = said(capsys, "train", str(DEMO), *files, *gpus)
    assert code == 2
    assert "a learner GPU needs" in err
    assert not (tmp_path / "runs").exists()


def test_a_sound_run_is_started(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: the same files and config without a fault."""
    started: list[Path] = []

    def note(run: Any, _config: Any) -> int:
        started.append(run.root)
        return 0

    monkeypatch.setattr(session, "_train", note)
    monkeypatch.setattr(session, "_sft", note)
    assert cli.main(["train", str(DEMO), *files]) == 0
    model = options(f"model.path={tmp_path}/base")
    assert cli.main(["sft", str(DEMO), *files, *model]) == 0
    assert [root.name for root in started] == ["demo", "demo-sft"]
    assert (tmp_path / "runs" / "demo" / "config.toml").exists()


def test_sft_asks_for_what_it_starts_from_and_leaves_the_actors_out(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = options(f"model.path={tmp_path}/base")
    wrong = options("learner.pipeline_parallel=3", "rollout.max_response_tokens=200000")
    code, err = said(capsys, "sft", str(DEMO), *files, *made, *wrong)
    assert code == 2
    assert err.splitlines() == [
        "demo.toml: learner.pipeline_parallel = 3 does not divide the 28 layers of model. Set it "
        "to a divisor."
    ]
    assert not (tmp_path / "runs").exists()


def test_what_sft_is_planned_for() -> None:
    config = load(DEMO, ["loss.kl_coef=0.1", "learner.data_parallel=2"])
    phase = sft_phase(config)
    plan = make_plan(phase, CONFIGS)
    assert config.sft is not None
    assert plan.step.responses == plan.step.responses_per_update == config.sft.batch_size
    assert plan.step.max_rank_tokens == 32 * config.learner.micro_batch_tokens
    assert plan.step.updates == 1
    assert phase.loss.kl_coef == 0, "it has no reference policy"


def test_sft_of_a_model_that_does_not_fit_is_refused(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus = options("hardware.gpus_per_node=8", "model.dtype=bfloat16")
    made = options(f"model.path={tmp_path}/base")
    code, err = said(capsys, "sft", str(DEMO), *files, *made, *gpus)
    assert code == 2
    # Weights, float32 gradients, main parameters and moments of 7.6 billion parameters.
    assert float(err.partition("needs ")[2].split()[0]) > (2 + 4 + 12) * 7.6e9 / GIB
    assert not (tmp_path / "runs").exists()
