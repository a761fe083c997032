"""The same step without this project: a transformers model, torch's AdamW, padded batches.

Two ways to lay the sequences out:

    padded      in the order of the batch; prompts padded on the left and responses on the right to
                the longest of the micro-batch, with an attention mask; the head computes the
                response's places, padding included. What trainers on transformers do.
    by length   sorted, so that there is little padding; padding on the right only, where causal
                attention needs no mask; the head computes the response tokens alone.

A micro-batch has at most `micro_batch_tokens` places, padding included. `padded` does not look at
the lengths and so takes as many sequences as fit when all have the longest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from .batch import draw
from .clock import Laps
from .task import Job

SEED = 0
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
LR, BETAS, EPS, WEIGHT_DECAY, GRAD_CLIP = 1e-6, (0.9, 0.999), 1e-8, 0.1, 1.0
ADVANTAGE_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Sequence:
    prompt: np.ndarray
    response: np.ndarray
    advantage: float

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(slots=True)
class Micro:
    """One forward pass: [B, S] places, N of which predict something."""

    token_ids: Tensor
    attention_mask: Tensor | None
    num_kept: int
    """The head computes this many last places of every row; 0: those at `places`."""
    places: Tensor | None
    """[N] in the flattened [B * S]."""
    targets: Tensor
    """[N] int64."""
    advantages: Tensor
    """[N] float32."""
    weights: Tensor
    """[N] float32; 0 where nothing trains."""
    old_logprobs: Tensor | None = None


class Plain:
    """A plain trainer with a batch on its device."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self.device = torch.device(job.device, 0) if job.device == "cuda" else torch.device("cpu")
        self.is_autocast = job.dtype == "bfloat16" and not job.is_plainly_bfloat16
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            job.model,
            dtype=torch.bfloat16 if job.is_plainly_bfloat16 else torch.float32,
            attn_implementation="sdpa",
        ).to(self.device)
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(self.model), lr=LR, betas=BETAS, eps=EPS, fused=True
        )
        self.micros = micros_of(job, self.device)
        self.grad_norm = 0.0

    def step(self) -> Laps:
        laps = Laps(self.device)
        self.score()
        laps.end("score")
        self.optimizer.zero_grad(set_to_none=True)
        for micro in self.micros:
            loss_of(self.log_probs(micro), micro).backward()
        laps.end("update")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        self.optimizer.step()
        self.grad_norm = float(norm)
        laps.end("optimizer")
        return laps

    @torch.no_grad()
    def score(self) -> None:
        for micro in self.micros:
            micro.old_logprobs = self.log_probs(micro)

    def log_probs(self, micro: Micro) -> Tensor:
        """[N] float32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_autocast):
            logits = self._logits(micro)
        return -F.cross_entropy(logits.float(), micro.targets, reduction="none")

    def _logits(self, micro: Micro) -> Tensor:
        """[N, V]."""
        if micro.places is None:
            logits: Tensor = self.model(
                micro.token_ids,
                attention_mask=micro.attention_mask,
                logits_to_keep=micro.num_kept,
                use_cache=False,
            ).logits
            # The last place predicts what comes after the response.
            return logits[:, :-1].flatten(0, 1)
        hidden = self.model.model(micro.token_ids, use_cache=False).last_hidden_state
        rows: Tensor = hidden.flatten(0, 1).index_select(0, micro.places)
        return self.model.lm_head(rows)

    def check(self) -> dict[str, float]:
        """Of the last step: what every team must agree on."""
        logprobs = tokens = 0.0
        for micro in self.micros:
            assert micro.old_logprobs is not None, "a step has scored"
            is_trained = micro.weights > 0
            logprobs += float(micro.old_logprobs[is_trained].double().sum())
            tokens += float(is_trained.sum())
        return {"mean_logprob": logprobs / tokens, "tokens": tokens, "grad_norm": self.grad_norm}


def loss_of(logprobs: Tensor, micro: Micro) -> Tensor:
    """-sum_t w_t min(r_t A_t, clip(r_t) A_t): DAPO's, with its denominator in the weights."""
    assert micro.old_logprobs is not None, "a step scores first"
    ratio = torch.exp(logprobs - micro.old_logprobs)
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    gain = torch.minimum(ratio * micro.advantages, clipped * micro.advantages)
    return -(micro.weights * gain).sum()


def _parameter_groups(model: torch.nn.Module) -> list[dict[str, object]]:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]


# ------------------------------------------------------------------ layout


def micros_of(job: Job, device: torch.device) -> list[Micro]:
    found = sequences_of(job)
    weight = 1.0 / sum(len(sequence.response) for sequence in found)
    budget = job.load.micro_batch_tokens
    if job.kind == "padded":
        longest = job.load.max_prompt_tokens + job.load.max_response_tokens
        size = max(budget // longest, 1)
        parts = [found[i : i + size] for i in range(0, len(found), size)]
        return [_padded(part, weight, device) for part in parts]
    return [_right_padded(part, weight, device) for part in by_length(found, budget)]


def sequences_of(job: Job) -> list[Sequence]:
    """Every response with its prompt, and (R - mean) / (std + eps) of its group."""
    found = []
    for group in draw(job.load, job.architecture.vocab, SEED):
        rewards = np.array([response.reward for response in group.responses])
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + ADVANTAGE_EPS)
        for response, advantage in zip(group.responses, advantages.tolist(), strict=True):
            found.append(Sequence(group.prompt.token_ids, response.token_ids, advantage))
    return found


def by_length(sequences: list[Sequence], budget: int) -> list[list[Sequence]]:
    """Neighbours in length together while their padded size fits the budget."""
    parts: list[list[Sequence]] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        if not parts or (len(parts[-1]) + 1) * len(parts[-1][0]) > budget:
            parts.append([])
        parts[-1].append(sequence)
    return parts


def _padded(part: list[Sequence], weight: float, device: torch.device) -> Micro:
    left = max(len(sequence.prompt) for sequence in part)
    right = max(len(sequence.response) for sequence in part)
    token_ids = np.zeros((len(part), left + right), np.int64)
    mask = np.zeros_like(token_ids)
    advantages, weights = np.zeros((2, len(part), right), np.float32)
    for row, sequence in enumerate(part):
        start, count = left - len(sequence.prompt), len(sequence.response)
        token_ids[row, start : left + count] = np.concatenate((sequence.prompt, sequence.response))
        mask[row, start : left + count] = 1
        advantages[row, :count], weights[row, :count] = sequence.advantage, weight
    return Micro(
        token_ids=torch.from_numpy(token_ids).to(device),
        attention_mask=torch.from_numpy(mask).to(device),
        num_kept=right + 1,
        places=None,
        targets=torch.from_numpy(token_ids[:, left:].reshape(-1)).to(device),
        advantages=torch.from_numpy(advantages.reshape(-1)).to(device),
        weights=torch.from_numpy(weights.reshape(-1)).to(device),
    )


def _right_padded(part: list[Sequence], weight: float, device: torch.device) -> Micro:
    longest = max(map(len, part))
    token_ids = np.zeros((len(part), longest), np.int64)
    places, targets, advantages = [], [], []
    for row, sequence in enumerate(part):
        token_ids[row, : len(sequence)] = np.concatenate((sequence.prompt, sequence.response))
        first = row * longest + len(sequence.prompt) - 1
        places.append(np.arange(first, first + len(sequence.response)))
        targets.append(sequence.response.astype(np.int64))
        advantages.append(np.full(len(sequence.response), sequence.advantage, np.float32))
    count = sum(map(len, targets))
    return Micro(
        token_ids=torch.from_numpy(token_ids).to(device),
        attention_mask=None,
        num_kept=0,
        places=torch.from_numpy(np.concatenate(places)).to(device),
        targets=torch.from_numpy(np.concatenate(targets)).to(device),
        advantages=torch.from_numpy(np.concatenate(advantages)).to(device),
        weights=torch.full((count,), weight, device=device),
    )
