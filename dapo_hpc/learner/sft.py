"""Supervised fine-tuning: the model before reinforcement learning, by the learner's own parts."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from torch import Tensor

from dapo_hpc.config import RunConfig, SftSection
from dapo_hpc.learner.checkpoint import Checkpoints, Progress
from dapo_hpc.learner.forward import Row, forward_backward, row, shares_of
from dapo_hpc.learner.model import Policy, is_complete
from dapo_hpc.learner.optimizer import AdamSettings, Optimizer
from dapo_hpc.learner.parallel import Processes
from dapo_hpc.observe.final import refusals_are_final
from dapo_hpc.observe.metrics import MetricsLog
from dapo_hpc.run_dir import RunDir
from dapo_hpc.weights.publish import write_model
from dapo_hpc.weights.source import RandomSource, SafetensorsSource, TensorSource

REPORT_EVERY = 10
"""Optimizer steps between rows of metrics."""
KEEP_CHECKPOINTS = 2

log = logging.getLogger(__name__)

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and of its response, the end token included."""


@dataclass(frozen=True, slots=True)
class SftRow:
    """One packed micro-batch of pairs."""

    row: Row
    weights: Tensor
    """[T] float32: 1 over the response tokens of the whole mini-batch, 0 elsewhere."""


class Pairs:
    """The pairs of a parquet file, tokenized batch by batch, in file order."""

    def __init__(self, section: SftSection) -> None:
        table = pq.read_table(section.pairs, columns=["prompt", "response"])
        self._prompts: list[str] = table["prompt"].to_pylist()
        self._responses: list[str] = table["response"].to_pylist()
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(section.init)
        self._size = section.batch_size
        if self._tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of sft.init = {section.init} has no end token.")
        if len(self) == 0:
            raise ValueError(
                f"{section.pairs} holds {table.num_rows} pairs, fewer than sft.batch_size = "
                f"{self._size}. Lower sft.batch_size."
            )
        left_over = table.num_rows % self._size
        if left_over:
            log.warning("the last %d pairs do not fill a batch and are not trained.", left_over)

    def __len__(self) -> int:
        """Whole batches, which is optimizer steps."""
        return len(self._prompts) // self._size

    def batch(self, index: int) -> list[Pair]:
        chosen = slice(index * self._size, (index + 1) * self._size)
        prompts = self._tokenizer(self._prompts[chosen])["input_ids"]
        responses = self._tokenizer(self._responses[chosen], add_special_tokens=False)
        return [
            (prompt, self._ended(response))
            for prompt, response in zip(prompts, responses["input_ids"], strict=True)
        ]

    def _ended(self, response: list[int]) -> list[int]:
        end: int = self._tokenizer.eos_token_id
        return response if response[-1:] == [end] else [*response, end]


def fine_tune(run: RunDir, config: RunConfig, here: Processes) -> None:
    """Train sft.init on sft.pairs and write the result to model.path.

    A complete model at model.path is left as it is. Raises Final for a model or pairs that cannot
    be trained so.
    """
    section, target = config.sft, Path(config.model.path)
    if section is None:
        raise ValueError("supervised fine-tuning needs an [sft] section; the config has none.")
    if is_complete(target):
        log.info("%s already holds a complete model; it is not trained again.", target)
        return
    with refusals_are_final():
        pairs = Pairs(section)
        policy, optimizer = _build(config, section, here)
    checkpoints = Checkpoints(
        run.checkpoints / "sft",
        here,
        keep=KEEP_CHECKPOINTS,
        is_async=config.learner.async_checkpoint,
    )
    progress = checkpoints.load_newest(policy, optimizer)
    meter = _Meter(run, here)
    for step in range(progress.step + 1 if progress else 1, len(pairs) + 1):
        micro_batches = pack_batch(policy, pairs.batch(step - 1), config.learner.micro_batch_tokens)
        lr = learning_rate(section, step, len(pairs))
        loss = update(policy, optimizer, micro_batches, lr, f"sft step {step}")
        meter.count(step, loss, micro_batches)
        checkpoints.save_when_due(
            policy,
            optimizer,
            Progress(step=step),
            every=section.checkpoint_every,
            last=len(pairs),
        )
    _export(policy, target, Path(section.init), config.weights.save_shard_bytes)
    log.info("%d steps are trained; the model is in %s.", len(pairs), target)


def learning_rate(section: SftSection, step: int, num_steps: int) -> float:
    """lr at optimizer step `step` (from 1) of `num_steps`.

    Rises linearly over sft.warmup_steps; falls linearly over the second half of the run to
    final_lr_frac of sft.lr.
    """
    rise = min(1.0, step / section.warmup_steps) if section.warmup_steps else 1.0
    past_half = max(0.0, 2.0 * step / num_steps - 1.0)
    return section.lr * rise * (1.0 - (1.0 - section.final_lr_frac) * past_half)


def update(
    policy: Policy,
    optimizer: Optimizer,
    micro_batches: Sequence[SftRow],
    lr: float,
    at: str = "an sft step",
) -> Tensor:
    """One optimizer step; this rank's share of the loss before it, a scalar on the device."""
    total = torch.zeros((), device=policy.processes.device)

    def cross_entropy(number: int, logprobs: Tensor, _entropy: Tensor) -> tuple[Tensor, None]:
        loss = -(logprobs * micro_batches[number].weights).sum()
        total.add_(loss.detach())
        return loss, None

    optimizer.zero_grad()
    forward_backward(policy, [micro.row for micro in micro_batches], cross_entropy)
    optimizer.step(lr, at=at)
    return total


def pack_batch(policy: Policy, batch: Sequence[Pair], budget_tokens: int) -> list[SftRow]:
    """This rank's share of a batch, as packed micro-batches of at most `budget_tokens`.

    Pairs are sorted by length and dealt to the data-parallel ranks in turn, so that ranks get
    nearly the same tokens and each micro-batch holds pairs of similar length. Every rank gets as
    many micro-batches.
    """
    here = policy.processes
    order = sorted(batch, key=lambda pair: -len(pair[0]) - len(pair[1]))
    hands = [
        _fill(order[rank :: here.layout.data], budget_tokens) for rank in range(here.layout.data)
    ]
    weight = 1.0 / sum(len(response) for _, response in batch)
    mine = hands[here.data_rank]
    mine += [[]] * (max(map(len, hands)) - len(mine))
    return [_pack(policy, members, weight) for members in mine]


def _fill(pairs: Sequence[Pair], budget: int) -> list[list[Pair]]:
    filled: list[list[Pair]] = []
    room = 0
    for prompt, response in pairs:
        size = len(prompt) + len(response)
        if not filled or size > room:
            filled.append([])
            room = budget
        filled[-1].append((prompt, response))
        room -= size
    return filled


def _pack(policy: Policy, pairs: Sequence[Pair], weight: float) -> SftRow:
    sequences = [prompt + response for prompt, response in pairs]
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    tokens = np.array([token for sequence in sequences for token in sequence], dtype=np.int64)
    weights = np.zeros(len(tokens), dtype=np.float32)
    for end, (_, response) in zip(np.cumsum(lengths), pairs, strict=True):
        weights[end - 1 - len(response) : end - 1] = weight
    # The last place of a sequence has no target and no weight.
    packed = row(policy, tokens, np.roll(tokens, -1), lengths, is_wanted=weights > 0)
    here = policy.processes
    if here.layout.context > 1:
        weights = shares_of(policy, lengths)[here.context_rank].take(weights)
    return SftRow(packed, torch.from_numpy(weights).to(here.device))


def _build(config: RunConfig, section: SftSection, here: Processes) -> tuple[Policy, Optimizer]:
    init = Path(section.init)
    policy = Policy.of(config, init, here, temperature=1.0)
    source: TensorSource = RandomSource(policy.shape, policy.hf.initializer_range, config.run.seed)
    if any(init.glob("*.safetensors")):
        source = SafetensorsSource(init)
    policy.load(source)
    settings = AdamSettings.of(config.optimizer, weight_decay=section.weight_decay)
    return policy, Optimizer(policy, settings)


def _export(policy: Policy, target: Path, init: Path, shard_bytes: int) -> None:
    tensors = policy.export()
    if policy.processes.rank == 0:
        write_model(target, tensors, init, shard_bytes)
    for _ in tensors:
        pass
    policy.processes.barrier()


class _Meter:
    """Loss and speed, a row every REPORT_EVERY steps. Collective where it writes."""

    def __init__(self, run: RunDir, here: Processes) -> None:
        self._here = here
        self._metrics = MetricsLog(run.metrics) if here.rank == 0 else None
        self._restart()

    def _restart(self) -> None:
        self._losses: list[Tensor] = []
        self._num_tokens, self._since_s = 0, time.perf_counter()

    def count(self, step: int, loss: Tensor, micro_batches: Sequence[SftRow]) -> None:
        self._losses.append(loss)
        self._num_tokens += sum(micro.row.num_tokens for micro in micro_batches)
        if step % REPORT_EVERY == 0:
            self._report(step)
            self._restart()

    def _report(self, step: int) -> None:
        sums = torch.tensor([float(torch.stack(self._losses).sum()), float(self._num_tokens)])
        loss, tokens = self._here.sum_over_ranks(sums * float(self._here.reports)).tolist()
        mean = loss / len(self._losses)
        if not math.isfinite(mean):
            raise FloatingPointError(f"sft step {step}: the loss is {mean}. Lower sft.lr.")
        rate = tokens / (time.perf_counter() - self._since_s)
        if self._metrics is not None:
            self._metrics.write("sft", step, {"sft/loss": mean, "sft/tokens_per_s": rate})
