"""What the learner's weights make of a few fixed sequences: the actors' check after each load."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dapo_hpc.learner.forward import log_probs, row, shares_of
from dapo_hpc.learner.model import Policy
from dapo_hpc.weights.manifest import Probe

NUM_PROBES = 4
PROBE_TOKENS = 16
SEED = 20240815
"""Of the tokens; any constant does, as long as every process has the same."""


def probe_tokens(hf: Any) -> np.ndarray:
    """[NUM_PROBES, PROBE_TOKENS] ids below the vocabulary, without special ones if possible."""
    special: set[int | None] = {None}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(hf, name, None)
        special |= set(value) if isinstance(value, list) else {value}
    ordinary = np.array([i for i in range(hf.vocab_size) if i not in special])
    choices = ordinary if len(ordinary) else np.arange(hf.vocab_size)
    return np.random.default_rng(SEED).choice(choices, (NUM_PROBES, PROBE_TOKENS))


def probes(policy: Policy) -> list[Probe]:
    """The learner's log-probs of the probe sequences at temperature 1, on every rank. Collective.

    Temperature 1 because the engine's log-probs of prompt tokens are raw.
    """
    tokens = probe_tokens(policy.hf).astype(np.int64)
    targets = np.roll(tokens, -1, axis=1)  # the last place of each sequence has no target
    lengths = np.full(NUM_PROBES, PROBE_TOKENS)
    packed = row(policy, tokens.reshape(-1), targets.reshape(-1), lengths)
    found = log_probs(policy, [packed], temperature=1.0)
    here = policy.processes
    mine = torch.zeros(tokens.size)
    if here.reports and here.data_rank == 0:
        share = shares_of(policy, lengths)[here.context_rank]
        mine = share.put_back(found[0][0], tokens.size)
    values = here.sum_over_ranks(mine).reshape(tokens.shape).tolist()
    return [
        Probe(token_ids=ids, logprobs=logprobs[:-1])
        for ids, logprobs in zip(tokens.tolist(), values, strict=True)
    ]
