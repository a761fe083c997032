"""What one step of one policy comes to."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .workload import Draw


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds and tokens are set by the caller, who knows when the step began."""

    num_groups: int
    num_dispatched: int
    used_tokens: int
    """In the responses trained."""
    used_mean: float
    """Mean tokens of the responses trained."""
    dispatched_mean: float
    """Mean tokens of all responses of the informative prompts dispatched, each at its full length:
    what the batch would look like if it were no choice."""
    seconds: float = 0.0
    tokens: float = 0.0
    """Sampled."""
    tail_wait_s: float = 0.0
    predicted: float = 0.0
    """Acceptance rate expected before the step."""
    accepted: float = 0.0
    """Informative among the groups that finished."""

    @classmethod
    def of(cls, used: list[Draw], dispatched: list[Draw]) -> Step:
        informative = [draw for draw in dispatched if draw.is_informative]
        return cls(
            num_groups=len(used),
            num_dispatched=len(dispatched),
            used_tokens=sum(sum(draw.lengths) for draw in used),
            used_mean=_mean_length(used),
            dispatched_mean=_mean_length(informative),
            accepted=len(informative) / len(dispatched),
        )

    def timed(self, seconds: float, tokens: float) -> Step:
        return replace(self, seconds=seconds, tokens=tokens)


def _mean_length(draws: list[Draw]) -> float:
    return sum(sum(draw.lengths) for draw in draws) / sum(len(draw.lengths) for draw in draws)
