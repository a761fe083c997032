"""Every figure a run reports: its name, unit and meaning; and the file they are written to."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import IO, Any, NamedTuple


class Metric(NamedTuple):
    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    # rollout and reward, over the train batch unless said otherwise
    "train/accuracy": Metric("share", "correct responses among all sampled for this step"),
    "train/reward_mean": Metric("1", "shaped reward of the train batch"),
    "train/response_tokens_mean": Metric("tokens", "response length of the train batch"),
    "train/response_tokens_max": Metric("tokens", "longest response of the train batch"),
    "train/truncated_frac": Metric("share", "responses cut at the limit"),
    "train/groups": Metric("groups", "groups trained"),
    # the learner's update
    "learner/loss": Metric("1", "clip-higher loss, mean over the step's updates"),
    "learner/entropy": Metric("nats", "of the policy over trained tokens, at the step's start"),
    "learner/grad_norm": Metric("1", "before clipping, mean over the step's updates"),
    "learner/lr": Metric("1", "learning rate of this step"),
    "learner/clipped_high_frac": Metric("share", "tokens whose ratio is cut from above"),
    "learner/clipped_low_frac": Metric("share", "tokens whose ratio is cut from below"),
    "learner/dual_clipped_frac": Metric("share", "tokens bounded by dual clip"),
    "learner/tokens_impossible": Metric("tokens", "of log-prob -inf: they add nothing to the loss"),
    "learner/old_kl": Metric("nats", "k1 estimate of KL(old || policy), mean over the updates"),
    "learner/ratio_mean": Metric("1", "ratio of policy to old, mean over the updates"),
    "learner/first_ratio_max_diff": Metric("1", "max |ratio - 1| on the first mini-batch"),
    "learner/kl": Metric("nats", "k3 estimate to the reference policy"),
    "learner/tokens": Metric("tokens", "trained tokens of the step"),
    "learner/padding_frac": Metric("share", "computed tokens that are padding"),
    "learner/skipped_updates": Metric("updates", "updates skipped for a non-finite gradient"),
    # engine against learner
    "mismatch/mean_diff": Metric("nats", "mean |old - rollout| log-prob of unstale tokens"),
    "mismatch/max_diff": Metric("nats", "largest |old - rollout| log-prob of unstale tokens"),
    "mismatch/kl": Metric("nats", "k3 estimate of KL(rollout || old) over unstale tokens"),
    "mismatch/ess_frac": Metric("share", "effective sample size of all importance weights"),
    "mismatch/capped_frac": Metric("share", "importance weights at the cap"),
    "mismatch/dropped_tokens": Metric("tokens", "tokens without a finite rollout log-prob"),
    # seconds of a step, in order
    "learner/wait_s": Metric("s", "waiting for the batch"),
    "learner/fetch_s": Metric("s", "reading the batch"),
    "learner/score_s": Metric("s", "old log-probs"),
    "learner/update_s": Metric("s", "all updates"),
    "learner/publish_s": Metric("s", "writing the weights"),
    "learner/checkpoint_s": Metric("s", "writing the checkpoint"),
    "learner/step_s": Metric("s", "the whole step"),
    "learner/idle_frac": Metric("share", "wait_s / step_s"),
    "learner/cpu_s": Metric("s", "processor time of the learner's processes so far"),
    "learner/peak_memory_mib": Metric("MiB", "of the largest learner process"),
    # the buffer, counted from the start of the run
    "buffer/groups_informative": Metric("groups", "finished and informative"),
    "buffer/groups_all_correct": Metric("groups", "finished and dropped: all correct"),
    "buffer/groups_all_wrong": Metric("groups", "finished and dropped: all wrong"),
    "buffer/kept_frac": Metric("share", "informative among the groups finished for this step"),
    "buffer/kept_frac_predicted": Metric("share", "the same, as expected before the step"),
    "buffer/tail_wait_s": Metric("s", "enough groups ready, but one dispatched earlier still open"),
    "buffer/tokens_trained": Metric("tokens", "in a batch"),
    "buffer/tokens_evaluated": Metric("tokens", "for held-out prompts"),
    "buffer/tokens_in_flight": Metric("tokens", "of groups that are open or ready"),
    "buffer/tokens_all_correct": Metric("tokens", "sampled for groups that were all correct"),
    "buffer/tokens_all_wrong": Metric("tokens", "sampled for groups that were all wrong"),
    "buffer/tokens_stale": Metric("tokens", "sampled by weights too old to train"),
    "buffer/tokens_surplus": Metric("tokens", "sampled past the end of a batch"),
    "buffer/tokens_quarantined": Metric("tokens", "sampled by weights of an abandoned lineage"),
    "buffer/tokens_parked": Metric("tokens", "sampled for prompts that were given up"),
    "buffer/tokens_preempted": Metric("tokens", "came after their actor had lost its lease"),
    "buffer/tokens_duplicate": Metric("tokens", "sampled twice"),
    # the same, as shares of all tokens generated; they add up to 1
    "buffer/tokens_trained_frac": Metric("share", "in a batch"),
    "buffer/tokens_evaluated_frac": Metric("share", "for held-out prompts"),
    "buffer/tokens_in_flight_frac": Metric("share", "of groups that are open or ready"),
    "buffer/tokens_all_correct_frac": Metric("share", "sampled for groups that were all correct"),
    "buffer/tokens_all_wrong_frac": Metric("share", "sampled for groups that were all wrong"),
    "buffer/tokens_stale_frac": Metric("share", "sampled by weights too old to train"),
    "buffer/tokens_surplus_frac": Metric("share", "sampled past the end of a batch"),
    "buffer/tokens_quarantined_frac": Metric("share", "sampled by weights of an abandoned lineage"),
    "buffer/tokens_parked_frac": Metric("share", "sampled for prompts that were given up"),
    "buffer/tokens_preempted_frac": Metric("share", "came after their actor had lost its lease"),
    "buffer/tokens_duplicate_frac": Metric("share", "sampled twice"),
    "buffer/tokens_unreported_frac": Metric("share", "generated, but did not arrive (yet)"),
    "buffer/leases_expired": Metric("leases", "taken back from silent actors"),
    "buffer/leases_crashed": Metric("leases", "given back by actors whose engine failed"),
    "buffer/prompts_parked": Metric("prompts", "given up: failures, or killed actors"),
    "buffer/prompts_suspect": Metric("prompts", "on trial for killing their actors"),
    "buffer/passes": Metric("passes", "complete passes over the prompts"),
    "buffer/invariant_violations": Metric("1", "must be 0; the sum of those below"),
    "buffer/i1_violations": Metric("1", "must be 0: no acknowledged response is lost"),
    "buffer/i2_violations": Metric("1", "must be 0: no group is trained twice"),
    "buffer/i3_violations": Metric("1", "must be 0: nothing too old is trained"),
    "buffer/i4_violations": Metric("1", "must be 0: a lost lease is leased again"),
    "buffer/i5_violations": Metric("1", "must be 0: batches are whole and informative"),
    "buffer/i6_violations": Metric("1", "must be 0: responses, groups and tokens are conserved"),
    "buffer/i7_violations": Metric("1", "must be 0: a batch asked for again is the same"),
    "buffer/i8_violations": Metric("1", "must be 0: batches are cut in dispatch order"),
    "buffer/i9_violations": Metric("1", "must be 0: no prompt is dropped in silence"),
    "buffer/i10_violations": Metric("1", "must be 0: no request passes without the token"),
    "buffer/i11_violations": Metric("1", "must be 0: what is kept is bounded"),
    "buffer/staleness_mean": Metric("versions", "of the trained groups' oldest tokens"),
    "buffer/staleness_max": Metric("versions", "of the trained groups' oldest tokens"),
    "buffer/cpu_s": Metric("s", "processor time of the buffer so far"),
    "buffer/peak_memory_mib": Metric("MiB", "of the buffer process"),
    # the actors, summed over those alive
    "actor/count": Metric("actors", "heard from within a lease time"),
    "actor/generated_tokens": Metric("tokens", "since the start of the run"),
    "actor/tokens_per_s": Metric("tokens/s", "sampled since the last step"),
    "actor/idle_frac": Metric("share", "of the actors' time since the last step"),
    "actor/cpu_s": Metric("s", "processor time of all actors so far"),
    "actor/peak_memory_mib": Metric("MiB", "of the largest actor"),
    "actor/verifier_timeouts": Metric("responses", "scored wrong because the scorer timed out"),
    "actor/probe_mean_diff": Metric("nats", "largest over actors, after the last load"),
    # evaluation
    "eval/accuracy": Metric("share", "avg@k on the held-out prompts"),
    "eval/pass_at_k": Metric("share", "prompts with a correct response among k"),
    "eval/response_tokens_mean": Metric("tokens", "response length on the held-out prompts"),
    # supervised fine-tuning
    "sft/loss": Metric("nats", "mean over response tokens"),
    "sft/tokens_per_s": Metric("tokens/s", "trained"),
}


class MetricsLog:
    """Append rows to `metrics.jsonl`. One writer: rank 0 of the learner.

    A row is `{"kind", "step", "lineage", "unix_s", "elapsed_s", <metric>: value, ...}`. After a
    restart the same step may appear again with a higher lineage; the last row of a (kind, step)
    counts (see `read`).
    """

    def __init__(self, path: Path, *, lineage: int = 0) -> None:
        self._file: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives with the process
        self._lineage = lineage
        self._started_s = time.monotonic()

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Append one row. Raises KeyError for a metric that METRICS does not describe."""
        for name in values:
            METRICS[name]
        row: dict[str, Any] = {
            "kind": kind,
            "step": step,
            "lineage": self._lineage,
            "unix_s": round(time.time(), 3),
            "elapsed_s": round(time.monotonic() - self._started_s, 3),
            **values,
        }
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def read(path: Path, kind: str) -> list[dict[str, Any]]:
    """Rows of one kind by step, abandoned lineages left out. A torn last line is ignored."""
    by_step: dict[int, dict[str, Any]] = {}
    if not path.exists():
        return []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["kind"] == kind:
            by_step[row["step"]] = row
    return [by_step[step] for step in sorted(by_step)]


def newest_step(path: Path, kind: str) -> int:
    """The furthest step with a row of a kind; 0 without any."""
    rows = read(path, kind)
    return int(rows[-1]["step"]) if rows else 0
