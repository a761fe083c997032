"""Config files: every problem at once, the nearest key, profiles, and the files we ship."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from dapo_hpc.config import ConfigProblems, dump, load, parse

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def table(**sections: dict[str, Any]) -> dict[str, Any]:
    least: dict[str, Any] = {
        "run": {"name": "r", "total_steps": 1},
        "model": {"path": "m"},
        "prompts": {"train": "a.parquet", "eval": "b.parquet"},
    }
    return {**least, **sections}


def problems_of(value: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigProblems) as caught:
        parse(value)
    return caught.value.problems


def test_every_problem_is_reported_at_once() -> None:
    found = problems_of(
        table(
            run={"name": "r"},
            loss={"clip_hi": 0.28, "clip_low": -1.0},
            buffer={"heartbeat_s": 60.0},
            learner={"mini_batches": 600},
        )
    )
    assert len(found) == 4 + 1
    text = "\n".join(found)
    assert "run.total_steps is missing" in text
    assert "unknown key loss.clip_hi; did you mean loss.clip_high?" in text
    assert "loss.clip_low = -1.0: input should be greater than 0." in text
    assert "buffer.heartbeat_s = 60.0 is more than a third of buffer.lease_s = 120.0" in text
    assert "learner.mini_batches = 600 is more than rollout.prompts_per_step = 512" in text


@pytest.mark.parametrize(
    ("section", "key", "suggestion"),
    [
        ("loss", "clip_hgih", "loss.clip_high"),  # a slip of the fingers
        ("rollout", "mini_batches", "learner.mini_batches"),  # right key, wrong section
        ("optimizer", "zzz", "no known key is close"),
    ],
)
def test_unknown_key_names_the_nearest(section: str, key: str, suggestion: str) -> None:
    assert suggestion in problems_of(table(**{section: {key: 3}}))[0]


def test_a_sound_table_has_no_problem() -> None:
    assert parse(table()).rollout.group_size == 16


def test_what_the_file_says_beats_the_profile_and_set_beats_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    text = dump(parse(table()))
    sections = tomllib.loads(text)
    path.write_text(
        'profile = "verl"\n[run]\nname = "r"\ntotal_steps = 1\n[model]\npath = "m"\n'
        '[prompts]\ntrain = "a"\neval = "b"\n[loss]\ndual_clip = 3.0\n'
    )
    assert sections["loss"]["dual_clip"] == 0.0
    assert load(path).loss.dual_clip == 3.0
    assert load(path).optimizer.warmup_steps == 10
    assert load(path, ["loss.dual_clip=5", "run.name=x"]).loss.dual_clip == 5.0


def test_profiles_differ_where_the_recipes_do() -> None:
    paper, verl, ours = (parse(table() | {"profile": p}) for p in ("paper", "verl", "default"))
    assert [c.optimizer.warmup_steps for c in (paper, verl, ours)] == [20, 10, 20]
    assert [c.loss.dual_clip for c in (paper, verl, ours)] == [0.0, 10.0, 0.0]
    assert [c.loss.importance_sampling for c in (paper, verl, ours)] == ["off", "off", "token"]
    normalizations = ["per_prompt", "global_tokens", "global_tokens"]
    assert [c.loss.normalization for c in (paper, verl, ours)] == normalizations
    assert [c.reward.boxed_fallback for c in (paper, verl, ours)] == [False, True, True]


def test_set_without_a_section_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(dump(parse(table())))
    with pytest.raises(ConfigProblems, match=r"--set clip_high=1: expected section\.key=value"):
        load(path, ["clip_high=1"])


def test_resolved_config_reads_back_as_itself() -> None:
    for path in CONFIGS:
        config = load(path)
        assert parse(tomllib.loads(dump(config))) == config


def test_ladder_changes_what_each_rung_is_named_after() -> None:
    rungs = [load(path) for path in CONFIGS if path.name.startswith("ladder")]
    assert len(rungs) == 6
    steps = [
        {
            key
            for section in ("loss", "reward", "buffer", "rollout", "optimizer", "learner", "eval")
            for key, value in getattr(after, section).model_dump().items()
            if getattr(before, section).model_dump()[key] != value
        }
        for before, after in zip(rungs, rungs[1:], strict=False)
    ]
    assert steps == [
        {"overlong_filtering"},
        {"clip_high"},
        {"overlong_punishment", "overlong_filtering"},
        {"normalization"},
        {"dynamic_sampling"},
    ]


def test_numbers_of_the_32b_run() -> None:
    config = load(ROOT / "configs" / "qwen2.5_32b_dapo.toml")
    rollout, learner = config.rollout, config.learner
    assert (rollout.prompts_per_step, rollout.group_size) == (512, 16)
    assert rollout.prompts_per_step * rollout.group_size // learner.mini_batches == 512
    assert (config.prompts.max_tokens, rollout.max_response_tokens) == (2048, 20480)
    assert config.reward.overlong_cache_tokens == 4096
    assert (config.loss.clip_low, config.loss.clip_high, config.loss.dual_clip) == (0.2, 0.28, 10)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-6, 0.1)
    assert (config.optimizer.warmup_steps, config.optimizer.grad_clip) == (10, 1.0)
    assert (config.eval.temperature, config.eval.top_p, config.eval.samples) == (1.0, 0.7, 32)
