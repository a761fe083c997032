"""The reference policy of the KL penalty: a second, frozen copy of the starting weights.

It exists only when loss.kl_coef > 0. It has no model of its own: its weights take the place of the
policy's for the length of one scoring pass, and cost one more copy of the parameters in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from dapo_hpc.learner.forward import Row, log_probs
from dapo_hpc.learner.model import Policy


class Reference:
    """Frozen weights of this rank's share of the model."""

    def __init__(self, policy: Policy) -> None:
        """Copy the weights that the policy holds now: before any checkpoint is loaded."""
        self._policy = policy
        self._weights = [p.detach().clone() for p in policy.module.parameters()]

    def log_probs(self, rows: Sequence[Row]) -> list[Tensor]:
        """[T] float32, nats, of each row; empty where this rank is not the last stage."""
        with self._in_place():
            return [logprobs for logprobs, _ in log_probs(self._policy, rows)]

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, parameter in enumerate(self._policy.module.parameters()):
            parameter.data, self._weights[i] = self._weights[i], parameter.data
