"""`dapo check`: the plan for a person and for a program, at once, and what it refuses."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dapo_hpc import cli
from dapo_hpc.config import load
from dapo_hpc.plan import make_plan, print_plan, table
from dapo_hpc.plan.memory import GIB
from tests.unit.test_cli import HEAVY, dapo, modules_after

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
LARGE = CONFIGS / "qwen2.5_32b_dapo.toml"
PUBLISHED = [LARGE, CONFIGS / "qwen2.5_7b_dapo.toml"]


def check(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["check", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def as_json(capsys: pytest.CaptureFixture[str], path: Path, *overrides: str) -> dict[str, Any]:
    words = [word for override in overrides for word in ("--set", override)]
    cli.main(["check", str(path), "--json", *words])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_check_takes_less_than_a_second() -> None:
    times = []
    for _ in range(3):
        begin_s = time.perf_counter()
        done = dapo("check", str(LARGE), "--set", "hardware.gpu_memory_gib=10")
        times.append(time.perf_counter() - begin_s)
        assert done.returncode == 2
    assert min(times) < 1.0


def test_check_imports_nothing_heavy() -> None:
    code = f"from dapo_hpc import cli; cli.main(['check', {str(LARGE)!r}, '--json'])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(sorted(sys.modules), file=sys.stderr)"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name.strip("' ").split(".")[0] for name in done.stderr.strip("[]\n").split(",")}
    assert "dapo_hpc" in loaded
    assert loaded.isdisjoint({*HEAVY, "numpy"})
    assert modules_after("import dapo_hpc.plan").isdisjoint({*HEAVY, "numpy"})


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_runs_fit_80_gb_at_20480_response_tokens(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(path)
    assert config.rollout.max_response_tokens == 20480
    assert (config.hardware.gpu_memory_gib, config.hardware.gpus_per_node) == (80, 8)
    found = as_json(capsys, path)
    assert found["problems"] == []
    for stage in found["learner_stages"]:
        assert 0.25 * 80 * GIB < stage["total"] < 0.8 * 80 * GIB, "neither tight nor wasteful"
    assert found["engine"]["full_sequences"] >= config.rollout.group_size
    assert config.learner.tensor_parallel <= config.hardware.gpus_per_node


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_numbers_of_the_published_runs(path: Path) -> None:
    """Source: the script of verl's DAPO recipe, for both models."""
    config = load(path)
    rollout, learner, optimizer = config.rollout, config.learner, config.optimizer
    assert (rollout.prompts_per_step, rollout.group_size, learner.mini_batches) == (512, 16, 16)
    assert (config.prompts.max_tokens, config.reward.overlong_cache_tokens) == (2048, 4096)
    assert (config.loss.clip_low, config.loss.clip_high, config.loss.dual_clip) == (0.2, 0.28, 10)
    assert (optimizer.lr, optimizer.weight_decay, optimizer.grad_clip) == (1e-6, 0.1, 1.0)
    assert (optimizer.warmup_steps, optimizer.schedule) == (10, "constant")
    assert (learner.micro_batch_tokens, rollout.max_batched_tokens) == (22528, 22528)
    assert (config.loss.kl_coef, config.loss.normalization) == (0, "global_tokens")


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_figures_of_the_documents_are_those_of_the_plan(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json(capsys, path)
    text = (CONFIGS.parent / "docs" / "layouts.md").read_text()
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {found['model']['name']} "))
    total = max(stage["total"] for stage in found["learner_stages"])
    processes = found["processes"]
    assert f"| {processes['learner']} GPUs: " in row
    assert f"| {total / GIB:.1f} | {processes['actors']} on " in row
    assert row.endswith(f"| {found['engine']['full_sequences']} |")


def test_what_a_person_reads(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = check(capsys, str(LARGE))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[-1] == f"{LARGE}: no problems."
    for words in (
        "32.8 billion parameters, bfloat16",
        "64 (64 GPUs on 8 nodes)",
        "tensor 8, pipeline 2, data 4",
        "sequence parallel, distributed optimizer, recompute full",
        "at most 184.5 million",
        "16, each on 512 responses",
        "log-prob chunk",
        "rollout.gpu_memory_frac = 0.8 of 80",
        "3 versions and the next, 61.0 each",
        "2 and the next, 427.2 each",
    ):
        assert words in out, words
    assert max(map(len, lines)) <= table.PLAIN_WIDTH
    assert all(line == line.rstrip() for line in lines)
    assert "\x1b" not in out


def test_the_total_is_the_sum_of_what_is_not_in_brackets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, out, _ = check(capsys, str(PUBLISHED[1]))
    rows = out.partition("a learner GPU, GiB")[2].partition("in brackets")[0]
    shares, _, total = rows.strip().rpartition("total")
    cells = [row.split()[-1] for row in shares.strip().splitlines()]
    assert any(cell.startswith("(") for cell in cells)
    added = [float(cell) for cell in cells if not cell.startswith("(")]
    assert sum(added) == pytest.approx(float(total.split()[0]), abs=0.05 * (len(added) + 1))


def test_a_terminal_gets_colour() -> None:
    plan = make_plan(load(LARGE), CONFIGS)
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    assert Console(file=stream).is_terminal
    print_plan(plan, stream)
    assert "a learner GPU, GiB" in stream.getvalue()


def test_what_does_not_fit_is_refused_with_its_shares_and_the_cheapest_change(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(LARGE), "--set", "learner.recompute=none"]
    code, out, err = check(capsys, *words)
    assert code == 2
    assert "no problems" not in out
    assert "of 80" in out
    assert err.startswith("qwen2.5_32b_dapo.toml: a learner GPU needs ")
    for share in ("weights", "gradients", "optimizer", "train batch", "activations", "allowance"):
        assert f"{share} " in err
    assert 'Cheapest change: learner.recompute = "full" (' in err
    code, _, err = check(capsys, *words, "--set", 'learner.recompute="full"')
    assert (code, err) == (0, "")


def test_every_problem_comes_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ("learner.tensor_parallel=3", "rollout.tensor_parallel=3", "learner.freeze=['x']")
    words = [word for override in overrides for word in ("--set", override)]
    code, _, err = check(capsys, str(LARGE), *words)
    assert code == 2
    assert 'learner.freeze has "x"' in err  # a fault of the file comes before the plan
    code, _, err = check(capsys, str(LARGE), *words[:4], "--set", "learner.freeze=['layers.64']")
    assert "learner.tensor_parallel = 3 does not divide num_attention_heads = 40" in err
    assert "rollout.tensor_parallel = 3 does not fit the 40 heads" in err
    assert "learner.freeze names layer 64, but the model has 64 layers" in err
    assert code == 2


def test_experts_of_a_dense_model_are_refused_with_or_without_the_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [str(LARGE), "--set", "learner.expert_parallel=2"]
    for more in ([], ["--set", f"model.path={tmp_path}/none"]):
        path = tmp_path / "run.toml"
        path.write_text(LARGE.read_text())
        code, _, err = check(capsys, *([str(path), *words[1:]] if more else words), *more)
        assert code == 2
        assert "learner.expert_parallel = 2: the models that the learner trains are dense" in err


def test_context_parallel_ranks_share_tokens_and_the_optimizer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain, shared = (
        as_json(capsys, LARGE, f"learner.context_parallel={ranks}") for ranks in (1, 2)
    )
    assert shared["problems"] == []
    assert shared["processes"]["learner"] == 2 * plain["processes"]["learner"]
    for stages in zip(plain["learner_stages"], shared["learner_stages"], strict=True):
        whole, half = stages
        assert half["weights"] == whole["weights"]
        assert half["optimizer"] == -(-whole["optimizer"] // 2)
        assert half["train_batch"] == -(-whole["train_batch"] // 2)
        # All but the keys and values of the other rank's tokens.
        assert 0.5 <= half["activations"] / whole["activations"] < 0.55
        assert 0.5 < half["backward"] / whole["backward"] < 0.7


def test_a_budget_below_the_longest_response_is_noted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is no fault: such a response is a micro-batch alone, and memory is planned for it."""
    small = as_json(capsys, LARGE, "learner.micro_batch_tokens=8192")
    usual = as_json(capsys, LARGE)
    assert small["learner_stages"] == usual["learner_stages"]
    assert "memory is planned for 22528 tokens" in " ".join(small["notes"])
    assert usual["notes"] == []


def test_wide_layouts_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, LARGE, "hardware.gpus_per_node=4")
    assert "learner.tensor_parallel = 8 reaches beyond one node of 4 GPUs" in found["notes"][0]


def test_without_a_model_there_is_a_plan_of_the_rest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(LARGE.read_text())
    code, out, err = check(capsys, str(path), "--set", f"model.path={tmp_path}/none")
    assert (code, err) == (0, "")
    assert "16, each on 512 responses" in out
    assert "holds no config.json yet" in " ".join(out.split())
    assert "a learner GPU" not in out


def test_the_model_itself_is_read_before_the_architecture_beside_the_config(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert as_json(capsys, LARGE)["model"]["file"].startswith(str(CONFIGS))
    own = tmp_path / "models" / "Qwen2.5-32B"
    own.mkdir(parents=True)
    source = CONFIGS / "models" / "Qwen2.5-32B" / "config.json"
    text = source.read_text().replace('"num_hidden_layers": 64', '"num_hidden_layers": 32')
    (own / "config.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert as_json(capsys, LARGE)["model"]["num_layers"] == 32


def test_a_model_that_sft_will_make_is_planned_from_what_it_starts_from(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    demo = CONFIGS / "demo.toml"
    model = tmp_path / "start"
    model.mkdir()
    (model / "config.json").write_text(
        (CONFIGS / "models" / "Qwen2.5-7B" / "config.json").read_text()
    )
    found = as_json(capsys, demo, f"model.path={tmp_path}/none", f"sft.init={model}")
    assert found["model"]["name"] == "start"
    assert found["learner_stages"][0]["allowance"] == 0, "the demo runs on processors"


def test_a_damaged_model_is_a_problem_and_not_a_crash(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    code, out, err = check(capsys, str(LARGE), "--set", f"model.path={tmp_path}")
    assert code == 2
    assert "model_type is mamba" in err
    assert "note:" not in out
    assert "16, each on 512 responses" in out
    (tmp_path / "config.json").write_text("{")
    code, _, err = check(capsys, str(LARGE), "--set", f"model.path={tmp_path}")
    assert code == 2
    assert "config.json" in err


def test_many_stages_are_shown_as_the_first_and_the_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = check(capsys, str(LARGE), "--set", "learner.pipeline_parallel=8")
    assert code == 0
    (heads,) = (line for line in out.splitlines() if line.startswith("a learner GPU"))
    assert heads.split()[4:] == ["stage", "1", "stage", "2", "stage", "3", "stage", "8"]
