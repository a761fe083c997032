"""One rollout step of the learner, on one screen: `rollout_step`. Every rank runs it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from dapo_hpc.config import LossSection
from dapo_hpc.learner.batch import Micro, TrainBatch, build, fetch_groups
from dapo_hpc.learner.correction import Mismatch, measure_mismatch
from dapo_hpc.learner.forward import forward_backward_dapo, log_probs
from dapo_hpc.learner.packing import plan_step
from dapo_hpc.learner.parallel import Processes
from dapo_hpc.learner.report import (
    Stopwatch,
    UpdateFigures,
    batch_metrics,
    padding_frac,
    process_metrics,
)
from dapo_hpc.learner.schedule import learning_rate
from dapo_hpc.learner.session import Session
from dapo_hpc.observe.final import Final

log = logging.getLogger(__name__)


IMPORTANCE_METRICS = ("mismatch/ess_frac", "mismatch/capped_frac")
"""Figures of the importance weights, which stale tokens have as well."""


class MismatchTooLarge(Final):
    """Engine and learner no longer hold the same policy; training on would be noise. A learner that
    is started again gets the same batch."""


def rollout_step(session: Session, step: int) -> dict[str, float]:
    """Train one batch, publish the new weights, checkpoint when due; returns the step's figures.

    Args:
        session: the learner of this rank.
        step: rollout step to train, from 1.
    """
    config, here = session.config, session.processes
    clock = Stopwatch()
    taken = session.take(step)
    clock.lap("wait")
    plan = plan_step(
        taken.groups,
        mini_batches=config.learner.mini_batches,
        micro_batch_tokens=config.learner.micro_batch_tokens,
        data_parallel=here.layout.data,
        seed=config.run.seed + step,
    )
    groups = fetch_groups(here, session.fetch, plan, taken.groups)
    batch = build(session.policy, config, plan, taken.groups, groups)
    clock.lap("fetch")
    scored = score(session, batch, policy_step=step - 1)
    check_mismatch(scored.engine, config.loss, step)
    clock.lap("score")

    lr = learning_rate(config.optimizer, step, total_steps=config.run.total_steps)
    figures = UpdateFigures(here.device)
    for number, mini_batch in enumerate(batch.mini_batches, 1):
        update(session, mini_batch, lr, figures, at=f"step {step}, update {number}")
    clock.lap("update")

    session.publish(step)
    clock.lap("publish")
    row = {
        **batch_metrics(taken.groups),
        **scored.metrics(),
        **figures.metrics(here, has_reference=session.reference is not None),
        **process_metrics(here),
        "learner/lr": lr,
        "learner/padding_frac": padding_frac(here, batch),
        "mismatch/dropped_tokens": float(batch.num_dropped_tokens),
        **taken.metrics,
    }
    # Before the checkpoint, because a resumed run does not train this step again; and after it,
    # because only then its duration is known.
    session.record(step, {**row, **clock.finish()})
    if session.checkpoint(step):
        clock.lap("checkpoint")
        session.record(step, {**row, **clock.finish()})
    return row


@dataclass(frozen=True, slots=True)
class Scored:
    """What the scoring pass saw, over all ranks."""

    engine: Mismatch
    """Engine against learner: trained tokens sampled by the very weights that score them."""
    trained: Mismatch
    """All trained tokens; what older weights sampled differs by the training since, too."""
    entropy: float
    """Nats, mean over the trained tokens."""

    def metrics(self) -> dict[str, float]:
        engine, trained = self.engine.metrics(), self.trained.metrics()
        weights = {name: trained[name] for name in IMPORTANCE_METRICS if name in trained}
        return {**engine, **weights, "learner/entropy": self.entropy}


def score(session: Session, batch: TrainBatch, policy_step: int) -> Scored:
    """Fill in old and reference log-probs, and compare with the engine's. Collective."""
    micros = batch.micros()
    rows = [micro.row for micro in micros]
    here, cap = session.processes, session.config.loss.importance_cap
    engine, trained = Mismatch.empty(here.device), Mismatch.empty(here.device)
    entropy_sum = torch.zeros((), dtype=torch.float64, device=here.device)
    # On stages before the last there are no log-probs, and both loops end at once.
    for micro, (old, entropy) in zip(micros, log_probs(session.policy, rows), strict=False):
        rollout, mask = micro.tokens.rollout_logprobs, micro.tokens.loss_mask
        micro.old_logprobs = old
        is_own = mask & (micro.tokens.sampling_steps == policy_step)
        engine = engine.merge(measure_mismatch(old, rollout, is_own, cap=cap))
        trained = trained.merge(measure_mismatch(old, rollout, mask, cap=cap))
        entropy_sum += (entropy * mask).sum(dtype=torch.float64)
    if session.reference is not None:
        for micro, ref in zip(micros, session.reference.log_probs(rows), strict=False):
            micro.ref_logprobs = ref
    engine, trained = _over_ranks(here, engine), _over_ranks(here, trained)
    entropy = here.sum_over_ranks(entropy_sum * float(here.reports))
    return Scored(engine, trained, float(entropy) / max(float(trained.sums[0]), 1.0))


def _over_ranks(here: Processes, mismatch: Mismatch) -> Mismatch:
    sums = here.sum_over_ranks(mismatch.sums * float(here.reports))
    return Mismatch(sums=sums, max_diff=here.max_over_ranks(mismatch.max_diff.reshape(1))[0])


def check_mismatch(mismatch: Mismatch, loss: LossSection, step: int) -> None:
    """Warn from loss.mismatch_warn on; raise MismatchTooLarge from loss.mismatch_stop on."""
    mean = mismatch.metrics().get("mismatch/mean_diff", 0.0)
    sentence = (
        f"step {step}: engine and learner differ by {mean:.4g} nats a token in the mean (largest "
        f"{mismatch.max_diff.item():.4g})"
    )
    if mean >= loss.mismatch_stop:
        raise MismatchTooLarge(
            f"{sentence}; loss.mismatch_stop = {loss.mismatch_stop:g}. They no longer hold the "
            "same policy: compare the actors' probe figures, dtype and temperature."
        )
    if mean >= loss.mismatch_warn:
        log.warning("%s; loss.mismatch_warn = %g.", sentence, loss.mismatch_warn)


def update(
    session: Session, mini_batch: list[Micro], lr: float, figures: UpdateFigures, *, at: str
) -> None:
    """One optimizer step on one mini-batch."""
    loss, optimizer = session.config.loss, session.optimizer
    optimizer.zero_grad()
    rows = [micro.row for micro in mini_batch]
    for value, stats in forward_backward_dapo(
        session.policy, rows, lambda number: mini_batch[number].loss_inputs(loss)
    ):
        figures.add(value, stats)
    figures.updates.append(optimizer.step(lr, at=at))
