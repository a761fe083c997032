"""Log-probs by transformers: the truth that vLLM's are compared with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def reference_logprobs(
    model: Path, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
) -> np.ndarray:
    """[n] of a response, by transformers in float32."""
    import torch

    token_ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = _network(model)(token_ids).logits[0] / temperature
    rows = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
    found: np.ndarray = rows.gather(1, token_ids[0, len(prompt) :, None])[:, 0].numpy()
    return found


@functools.lru_cache
def _network(model: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
