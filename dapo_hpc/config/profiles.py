"""What each profile sets beneath the TOML file."""

from __future__ import annotations

from typing import Any

from dapo_hpc.config.sections import Profile

PROFILES: dict[Profile, dict[str, Any]] = {
    "paper": {
        "optimizer.warmup_steps": 20,
        "optimizer.first_warmup_step": 1,
        "loss.dual_clip": 0.0,
        "loss.normalization": "per_prompt",
        "loss.importance_sampling": "off",
        "reward.boxed_fallback": False,
        "eval.top_p": 0.7,
    },
    "verl": {
        "optimizer.warmup_steps": 10,
        "optimizer.first_warmup_step": 0,
        "loss.dual_clip": 10.0,
        "loss.normalization": "global_tokens",
        "loss.importance_sampling": "off",
        "reward.boxed_fallback": True,
        "eval.top_p": 0.7,
    },
    "default": {
        "optimizer.warmup_steps": 20,
        "optimizer.first_warmup_step": 1,
        "loss.dual_clip": 0.0,
        "loss.normalization": "global_tokens",
        "loss.importance_sampling": "token",
        "reward.boxed_fallback": True,
        "eval.top_p": 0.7,
    },
}
"""What each profile sets beneath the TOML file. Everything else is the class default, which the
three share."""
