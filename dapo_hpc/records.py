"""The records that cross a boundary between prompts, rollout, reward, buffer, learner and weights.

Every record is frozen. Arrays are one-dimensional numpy arrays: token ids int32, log-probs float32
(nats). A record that travels over the network is encoded by `dapo_hpc.buffer.messages`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

LeaseKind = Literal["train", "eval"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class PolicyVersion:
    """Trained weights, named by the rollout steps trained so far and the learner's lineage."""

    step: int
    """Rollout steps trained so far; 0 is the model the run started from."""
    lineage: int
    """Which attempt of the learner published it; +1 each time the learner (re)starts."""

    @property
    def name(self) -> str:
        """The directory name under `weights/`, sortable as text."""
        return f"v{self.step:06d}-l{self.lineage:03d}"

    @classmethod
    def parse(cls, name: str) -> PolicyVersion:
        """The inverse of `name`. Raises ValueError for any other text."""
        head, separator, tail = name.partition("-l")
        if not (separator and head[:1] == "v" and head[1:].isdigit() and tail.isdigit()):
            raise ValueError(
                f"{name!r} is not a policy version; expected a name like v000012-l001."
            )
        return cls(step=int(head[1:]), lineage=int(tail))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question and its answer key, not yet sampled."""

    uid: str
    """Hash of the prompt's text and answer key; the same in every run that holds the prompt."""
    row: int
    """Row in the run's prepared prompt file."""
    token_ids: np.ndarray
    """[P] int32; chat template applied."""
    data_source: str
    ground_truth: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """From token `start` on, up to the next span, a response was sampled by `version`."""

    start: int
    version: PolicyVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialResponse:
    """The tokens of an unfinished response that are known so far; empty for a new one."""

    index: int
    """Place in the group, 0 to G - 1."""
    token_ids: np.ndarray
    """[n] int32."""
    rollout_logprobs: np.ndarray
    """[n] float32, nats; the engine's, at sampling time."""
    spans: tuple[VersionSpan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right of one actor to sample the missing responses of one prompt for `lease_s`."""

    lease_id: int
    """The fencing token: unique and increasing over the life of a run."""
    group_id: int
    """The dispatch of a prompt this lease belongs to; increasing in dispatch order."""
    kind: LeaseKind
    attempt: int
    """0 for the first dispatch of this group, +1 each time it is leased again."""
    prompt: Prompt
    missing: tuple[PartialResponse, ...]
    """One entry for each response to sample, holding what an earlier actor already sampled."""
    version: PolicyVersion | None
    """Evaluation: the only policy version that may sample this. Training: None."""
    lease_s: float
    """Duration granted; each heartbeat grants it anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One finished answer, scored."""

    index: int
    token_ids: np.ndarray
    """[n] int32, the end token included; n >= 1."""
    rollout_logprobs: np.ndarray
    """[n] float32, nats."""
    spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    """'stop': an end token was sampled. 'length': cut at the limit."""
    is_correct: bool
    """The raw outcome; dynamic sampling filters on it."""
    reward: float
    """The shaped reward (correctness + overlong punishment); advantages are computed from it."""
    is_verifier_timeout: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSummary:
    """What the learner needs to plan a step before it reads any token."""

    group_id: int
    prompt_row: int
    num_prompt_tokens: int
    num_tokens: tuple[int, ...]
    """[G] tokens of each response."""
    rewards: tuple[float, ...]
    """[G] shaped rewards."""
    is_correct: tuple[bool, ...]
    """[G]"""
    is_truncated: tuple[bool, ...]
    """[G] finish_reason == 'length'."""
    min_step: int
    """Policy step of the oldest token in the group."""
    max_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The G responses of one prompt; trained or dropped together."""

    group_id: int
    prompt: Prompt
    responses: tuple[Response, ...]
    """[G], ordered by index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """A finished evaluation of one policy version."""

    version: PolicyVersion
    num_prompts: int
    num_samples: int
    """Responses for each prompt: the k of avg@k."""
    accuracy: float
    """avg@k: mean over prompts and samples."""
    pass_at_k: float
    """Share of prompts with at least one correct response."""
    mean_tokens: float
    accuracy_by_source: dict[str, float]
