"""Is a provider right? Its results against float64, before anything is timed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .task import Results

TOLERANCE = 0.05
"""Relative, in the Euclidean norm. Rounding a logit of 16 to 32 to bfloat16 moves a log-prob by up
to 0.06, which is 0.01 of the log-probs here; what is wrong is off by about itself."""

Errors = dict[str, dict[str, float]]


def errors_of(results: Results, truth: Results) -> Errors:
    """Result to relative error, that of its worst row, the largest absolute one, and that over
    the largest logit, where the truth has one.

    A result without truth, of another shape or not finite has error inf.
    """
    logit = float(truth.get("largest_logit", math.inf))
    return {name: _error(value, truth.get(name), logit) for name, value in results.items()}


def _error(value: Tensor, true: Tensor | None, logit: float) -> dict[str, float]:
    if true is None or value.shape != true.shape:
        return dict.fromkeys(("relative", "worst_row", "largest", "per_logit"), math.inf)
    true = true.double().reshape(len(true) if true.dim() > 1 else 1, -1)
    difference = value.detach().double().cpu().reshape(true.shape) - true
    in_rows = _ratio(difference.norm(dim=1), true.norm(dim=1))
    figures = {
        "relative": _ratio(difference.norm(), true.norm()),
        "worst_row": in_rows.amax(),
        "largest": difference.abs().amax(),
        "per_logit": difference.abs().amax() / logit,
    }
    return {name: _finite(figure.item()) for name, figure in figures.items()}


def _ratio(error: Tensor, size: Tensor) -> Tensor:
    """Where the truth is 0, the error itself: any at all is too much."""
    return torch.where(size > 0, error / size, torch.where(error > 0, math.inf, 0.0))


def _finite(figure: float) -> float:
    return figure if math.isfinite(figure) else math.inf


def worst(errors: Errors) -> float | None:
    """Largest relative error; None where there was nothing to compare, or nothing finite."""
    largest = max((figures["relative"] for figures in errors.values()), default=math.inf)
    return largest if math.isfinite(largest) else None


def verdict(errors: Errors) -> tuple[str, str]:
    """Status, and the sentence for a wrong one."""
    bad = {name: f["relative"] for name, f in errors.items() if not f["relative"] <= TOLERANCE}
    if not bad:
        return "right", ""
    listed = ", ".join(f"{name} {_percent(figure)}" for name, figure in bad.items())
    return "wrong", f"differs from float64: {listed}; allowed is {TOLERANCE:.0%}"


def _percent(figure: float) -> str:
    return "entirely" if math.isinf(figure) else f"by {figure:.0%}"


def as_json(errors: Errors) -> dict[str, Any]:
    """JSON has no inf."""
    return {
        name: {key: figure if math.isfinite(figure) else None for key, figure in figures.items()}
        for name, figures in errors.items()
    }
