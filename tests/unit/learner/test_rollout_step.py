"""One rollout step: its gradients against transformers, its figures, its guards."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch

from dapo_hpc.config import RunConfig
from dapo_hpc.learner.parallel import Processes
from dapo_hpc.learner.session import Session, open_session
from dapo_hpc.learner.step import MismatchTooLarge, rollout_step
from dapo_hpc.observe.metrics import METRICS
from dapo_hpc.records import Group
from dapo_hpc.run_dir import RunDir
from tests.learner_parts import FakeBuffer, make_config, make_model


def start(
    here: Processes, root: Path, *, staleness: int = 0, **sections: dict[str, Any]
) -> tuple[Session, Any]:
    """A session after `resume`, and the same model in transformers."""
    model = make_model(root / "model")
    config: RunConfig = make_config(root / "model", root, **sections)
    run = RunDir(config.run_dir)
    run.root.mkdir(parents=True)
    session = open_session(run, config, here, FakeBuffer(staleness=staleness))
    session.resume()
    return session, model


def row_of(session: Session, step: int) -> dict[str, Any]:
    lines = session.run.metrics.read_text().splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return next(r for r in reversed(rows) if r["kind"] == "step" and r["step"] == step)


def dapo_gradient(model: Any, groups: list[Group], cap: float | None, temperature: float) -> float:
    """One backward pass of the objective at ratio 1, response by response. Returns the entropy.

    There the gradient of the clipped objective is that of -sum A w logprob / tokens.
    """
    num_tokens = sum(len(r.token_ids) for group in groups for r in group.responses)
    entropy = 0.0
    for group in groups:
        rewards = np.array([r.reward for r in group.responses])
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        for response, advantage in zip(group.responses, advantages, strict=True):
            prompt = group.prompt.token_ids
            ids = torch.from_numpy(np.concatenate([prompt, response.token_ids]).astype(np.int64))
            logits = model(ids[None]).logits[0] / temperature
            distribution = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
            logprobs = distribution.gather(1, ids[len(prompt) :, None])[:, 0]
            weights = torch.ones(len(logprobs))
            if cap is not None:
                rollout = torch.from_numpy(response.rollout_logprobs)
                weights = (logprobs.detach() - rollout).exp().clamp(max=cap)
            (-(logprobs * weights).sum() * float(advantage) / num_tokens).backward()
            entropy -= float((distribution.exp() * distribution).sum()) / num_tokens
    return entropy


@pytest.mark.parametrize("sampling", ["token", "off"])
@pytest.mark.parametrize("budget", [32, 4096])  # many micro-batches; one
def test_first_update_is_the_gradient_of_the_objective(
    sampling: str, budget: int, here: Processes, tmp_path: Path
) -> None:
    session, model = start(
        here,
        tmp_path,
        learner={"mini_batches": 1, "micro_batch_tokens": budget},
        loss={"importance_sampling": sampling},
        rollout={"temperature": 0.8},
    )
    rollout_step(session, 1)
    groups = FakeBuffer().batch(1)
    entropy = dapo_gradient(model, groups, 2.0 if sampling == "token" else None, 0.8)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    row = row_of(session, 1)
    assert row["learner/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert row["learner/entropy"] == pytest.approx(entropy, rel=1e-5)
    assert row["learner/first_ratio_max_diff"] == 0.0
    assert row["learner/lr"] == pytest.approx(5e-4)  # step 1 of 2 of warm-up

    groups_of = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups_of, lr=5e-4).step()
    moved = 0.0
    for name, value in session.policy.export():
        truth = model.state_dict()[name]
        # Adam's first step is lr * sign(gradient): noise decides only where the gradient is 0.
        assert torch.quantile((value - truth).abs().flatten(), 0.9) < 1e-6, name
        moved = max(moved, float((value - truth).abs().max()))
    assert moved <= 2 * 5e-4 + 1e-6


def test_another_clip_of_the_weights_gives_another_gradient(tmp_path: Path) -> None:
    """Negative control for the comparison above."""
    model = make_model(tmp_path)
    norms = []
    for cap in (2.0, 1.0):
        model.zero_grad()
        dapo_gradient(model, FakeBuffer().batch(1), cap, 1.0)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)))
    assert abs(norms[0] / norms[1] - 1) > 1e-2


def test_ratio_of_the_first_mini_batch_is_exactly_one(here: Processes, tmp_path: Path) -> None:
    session, _ = start(here, tmp_path, learner={"mini_batches": 4, "micro_batch_tokens": 48})
    for step in (1, 2):
        rollout_step(session, step)
        assert row_of(session, step)["learner/first_ratio_max_diff"] == 0.0


def test_ratio_figures_show_that_the_policy_leaves_the_old_one(
    here: Processes, tmp_path: Path
) -> None:
    figures = []
    for mini_batches in (1, 4):
        session, _ = start(
            here,
            tmp_path / str(mini_batches),
            learner={"mini_batches": mini_batches},
            optimizer={"lr": 1e-2, "warmup_steps": 0},
        )
        figures.append(rollout_step(session, 1))
    assert figures[0]["learner/ratio_mean"] == 1.0
    assert figures[0]["learner/old_kl"] == 0.0
    assert figures[1]["learner/ratio_mean"] != 1.0
    assert figures[1]["learner/old_kl"] != 0.0


def test_every_figure_of_a_step_is_described_and_present(here: Processes, tmp_path: Path) -> None:
    session, _ = start(here, tmp_path, loss={"kl_coef": 0.1})
    rollout_step(session, 1)
    row = row_of(session, 1)
    expected = {m for m in METRICS if m.split("/")[0] in ("train", "learner", "mismatch")}
    assert expected <= row.keys()
    assert row["learner/tokens"] == sum(
        len(r.token_ids) for group in FakeBuffer().batch(1) for r in group.responses
    )
    assert row["learner/tokens_impossible"] == 0


def test_kl_to_the_start_is_zero_at_first_and_grows(here: Processes, tmp_path: Path) -> None:
    session, _ = start(
        here, tmp_path, loss={"kl_coef": 0.1}, learner={"mini_batches": 1}, optimizer={"lr": 1e-2}
    )
    figures = [rollout_step(session, step)["learner/kl"] for step in (1, 2, 3)]
    assert figures[0] == 0.0
    assert 0.0 < figures[1] < figures[2]


def test_the_kl_pulls_towards_the_start(here: Processes, tmp_path: Path) -> None:
    ends = []
    for coefficient in (1e-12, 1000.0):
        root = tmp_path / str(coefficient)
        session, _ = start(here, root, loss={"kl_coef": coefficient}, optimizer={"lr": 1e-2})
        ends.append([rollout_step(session, step) for step in (1, 2, 3)][-1]["learner/kl"])
    assert ends[1] < 0.5 * ends[0]


def test_tokens_without_a_finite_log_prob_leave_the_loss(here: Processes, tmp_path: Path) -> None:
    session, _ = start(here, tmp_path)

    class Holes(FakeBuffer):
        def batch(self, step: int) -> list[Group]:
            groups = super().batch(step)
            first = groups[0].responses[0]
            holes = first.rollout_logprobs.copy()
            holes[0] = np.nan
            responses = (replace(first, rollout_logprobs=holes), *groups[0].responses[1:])
            return [replace(groups[0], responses=responses), *groups[1:]]

    session.buffer = Holes()
    session.buffer.lineage = session.lineage
    figures = rollout_step(session, 1)
    assert figures["mismatch/dropped_tokens"] == 1.0
    total = sum(len(r.token_ids) for group in FakeBuffer().batch(1) for r in group.responses)
    assert figures["learner/tokens"] == total - 1
    assert np.isfinite(figures["learner/loss"])


def test_a_mismatch_warns_and_then_stops_before_any_update(
    here: Processes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = {"mismatch_warn": 0.01, "mismatch_stop": 0.02}
    session, _ = start(here, tmp_path / "stop", loss=limits)
    before = [p.detach().clone() for p in session.policy.module.parameters()]
    with pytest.raises(MismatchTooLarge, match="mismatch_stop = 0.02"):
        rollout_step(session, 1)
    after = session.policy.module.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    session, _ = start(here, tmp_path / "warn", loss={"mismatch_warn": 0.01})
    with caplog.at_level(logging.WARNING):
        rollout_step(session, 1)
    assert "loss.mismatch_warn = 0.01" in caplog.text


def test_stale_tokens_differ_by_training_and_do_not_count_as_mismatch(
    here: Processes, tmp_path: Path
) -> None:
    limits = {"mismatch_warn": 0.01, "mismatch_stop": 0.02}
    session, _ = start(here, tmp_path, staleness=1, loss=limits)
    figures = rollout_step(session, 1)
    assert "mismatch/mean_diff" not in figures
    assert 0 < figures["mismatch/ess_frac"] < 1
