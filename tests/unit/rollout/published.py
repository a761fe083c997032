"""What a learner would publish: a model's own weights and its own log-probs as the probe."""

from __future__ import annotations

from pathlib import Path

from reference import reference_logprobs

from dapo_hpc.records import PolicyVersion
from dapo_hpc.weights.manifest import Probe

PROBE_TOKENS = [1, 10, 2, 11, 3]


def publish_model(weights: Path, version: PolicyVersion, model: Path, shift: float = 0.0) -> Path:
    from safetensors.torch import load_file

    from dapo_hpc.weights.publish import publish

    weights.mkdir(exist_ok=True)
    truth = reference_logprobs(model, PROBE_TOKENS[:1], PROBE_TOKENS[1:]) + shift
    probe = Probe(token_ids=PROBE_TOKENS, logprobs=truth.tolist())
    tensors = iter(load_file(model / "model.safetensors").items())
    return publish(weights, version, tensors, [probe], model, 2**30)
