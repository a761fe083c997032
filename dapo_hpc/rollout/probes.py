"""The proof, after each load, that the engine holds the learner's policy."""

from __future__ import annotations

import numpy as np

from dapo_hpc.rollout.engine import Engine
from dapo_hpc.weights.manifest import WeightManifest


class ProbeMismatch(RuntimeError):
    """Engine and learner disagree about the policy: sampling would train on another model."""


def check_probes(engine: Engine, manifest: WeightManifest, *, tolerance: float) -> float:
    """Compare the engine's log-probs of the manifest's probes with the learner's.

    Args:
        engine: with the manifest's weights loaded.
        manifest: of the version loaded.
        tolerance: nats; largest mean |learner - engine| (weights.probe_tolerance).

    Returns:
        The mean difference, nats; 0 when the manifest has no probes.

    Raises:
        ProbeMismatch: beyond the tolerance, or not a number; do not sample.
    """
    found = engine.probe([probe.token_ids for probe in manifest.probes])
    differences = [
        np.abs(ours - np.asarray(probe.logprobs[: len(ours)], dtype=np.float32))
        for ours, probe in zip(found, manifest.probes, strict=True)
    ]
    if not differences:
        return 0.0
    difference = np.concatenate(differences)
    mean = float(difference.mean())
    if not mean <= tolerance:  # true for NaN as well
        raise ProbeMismatch(
            f"weights {manifest.version.name}: engine and learner differ by {mean:.4g} nats on "
            f"average over {difference.size} probe tokens (largest {difference.max():.4g}); "
            f"weights.probe_tolerance = {tolerance:g}. Sampling would train on another policy; "
            "compare the model configs and dtypes of learner and actor."
        )
    return mean
