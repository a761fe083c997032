"""The demo trained by TRL's GRPOTrainer (loss_type "dapo", transformers generation), as a peer.

Runs in an environment of its own (`make bench-peer`) on the files of the demo: the same base model,
prompts, scorer, held-out questions, batch (24 x 16 responses, 4 optimizer steps) and threads as
`configs/demo.toml`. Prints one JSON row for each generation. Started by `bench_demo.py --peer trl`.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import dataclass, field
from typing import Any

STARTED_S = time.monotonic()

import pyarrow.parquet as pq  # noqa: E402 - the clock starts before the imports
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from dapo_hpc.demo.digits import score  # noqa: E402

MAX_RESPONSE_TOKENS = 40
SAMPLES = 384
UPDATES = 4
"""Optimizer steps for each generation."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--steps", type=int, required=True, help=f"generations of {SAMPLES}")
    parser.add_argument("--eval-every", type=int, default=2, help="generations; 0: never")
    parser.add_argument("--eval-samples", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", required=True, help="scratch directory of the trainer")
    return parser.parse_args()


def rows(path: str) -> list[dict[str, str]]:
    """Question and answer key of each row of a parquet file in the schema of DAPO-Math-17K."""
    return [
        {"prompt": row["prompt"][0]["content"], "answer": row["reward_model"]["ground_truth"]}
        for row in pq.read_table(path).to_pylist()
    ]


@dataclass
class Judge:
    """The demo's scorer, as a reward function and as an evaluation."""

    model: Any
    tokenizer: Any
    heldout: list[dict[str, str]]
    samples: int
    spent_s: float = field(default=0.0)
    """In evaluations so far."""

    def is_correct(self, token_ids: list[int], answer: str) -> bool:
        ended = self.tokenizer.eos_token_id in token_ids
        return ended and score(self.tokenizer.decode(token_ids, skip_special_tokens=True), answer)

    def reward(self, completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        pairs = zip(completion_ids, answer, strict=True)
        return [1.0 if self.is_correct(ids, key) else -1.0 for ids, key in pairs]

    def accuracy(self) -> float:
        began_s = time.monotonic()
        self.model.eval()
        answers = [row["answer"] for row in self.heldout] * self.samples
        responses = [ids for _ in range(self.samples) for ids in self._sample()]
        self.model.train()
        self.spent_s += time.monotonic() - began_s
        correct = sum(map(self.is_correct, responses, answers))
        return correct / len(answers)

    @torch.no_grad()
    def _sample(self) -> list[list[int]]:
        texts = [row["prompt"] for row in self.heldout]
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True)
        output = self.model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=MAX_RESPONSE_TOKENS,
        )
        return output[:, encoded["input_ids"].shape[1] :].tolist()


class Reporter(TrainerCallback):
    """One row after each generation's last update."""

    def __init__(self, judge: Judge, eval_every: int) -> None:
        self.judge, self.eval_every = judge, eval_every

    def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step % UPDATES == 0:
            self.report(state.global_step // UPDATES)

    def report(self, step: int) -> None:
        row = {
            "step": step,
            "samples": SAMPLES * step,
            "elapsed_s": time.monotonic() - STARTED_S,
            "cpu_s": time.process_time(),
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        if self.eval_every and step % self.eval_every == 0:
            row["accuracy"] = self.judge.accuracy()
        print(json.dumps({**row, "eval_s": self.judge.spent_s}), flush=True)


def settings(args: argparse.Namespace) -> GRPOConfig:
    return GRPOConfig(
        output_dir=args.output,
        seed=args.seed,
        per_device_train_batch_size=SAMPLES // UPDATES,
        steps_per_generation=UPDATES,
        gradient_accumulation_steps=1,
        num_generations=16,
        max_completion_length=MAX_RESPONSE_TOKENS,
        max_steps=UPDATES * args.steps,
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        num_iterations=1,
        scale_rewards="group",
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        temperature=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=10_000,
        disable_tqdm=True,
    )


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    judge = Judge(model, tokenizer, rows(args.heldout), args.eval_samples)
    reporter = Reporter(judge, args.eval_every)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=judge.reward,
        train_dataset=Dataset.from_list(rows(args.train)),
        processing_class=tokenizer,
        callbacks=[reporter],
        args=settings(args),
    )
    reporter.report(0)
    trainer.train()


if __name__ == "__main__":
    main()
