"""The demo trained by TRL's GRPOTrainer (loss_type "dapo", transformers generation), as a peer.

Runs in an environment of its own (`make setup-peer`) on the files of the demo: the same base model,
prompts, scorer, held-out questions, batch (24 x 16 responses, 4 optimizer steps) and threads as
`configs/demo.toml`. Prints one JSON row for each generation. Started by `bench_demo.py --peer trl`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time

STARTED_S = time.monotonic()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--steps", type=int, required=True, help="generations of 384 samples")
    parser.add_argument("--eval-every", type=int, default=2, help="generations; 0: never")
    parser.add_argument("--eval-samples", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", required=True, help="scratch directory of the trainer")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    import pyarrow.parquet as pq
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from dapo_hpc.demo.digits import score

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)

    def rows(path: str) -> list[dict[str, str]]:
        return [
            {"prompt": r["prompt"][0]["content"], "answer": r["reward_model"]["ground_truth"]}
            for r in pq.read_table(path).to_pylist()
        ]

    def is_correct(token_ids: list[int], answer: str) -> bool:
        ended = tokenizer.eos_token_id in token_ids
        return ended and score(tokenizer.decode(token_ids, skip_special_tokens=True), answer)

    def reward(completion_ids: list[list[int]], answer: list[str], **_: object) -> list[float]:
        pairs = zip(completion_ids, answer, strict=True)
        return [1.0 if is_correct(ids, key) else -1.0 for ids, key in pairs]

    heldout = rows(args.heldout)

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        encoded = tokenizer([r["prompt"] for r in heldout], return_tensors="pt", padding=True)
        correct = total = 0
        for _ in range(args.eval_samples):
            output = model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=40,
            )[:, encoded["input_ids"].shape[1] :]
            correct += sum(
                is_correct(ids, r["answer"])
                for ids, r in zip(output.tolist(), heldout, strict=True)
            )
            total += len(heldout)
        model.train()
        return correct / total

    eval_s = 0.0

    def report(step: int) -> None:
        nonlocal eval_s
        row = {
            "step": step,
            "samples": 384 * step,
            "elapsed_s": time.monotonic() - STARTED_S,
            "cpu_s": time.process_time(),
        }
        if args.eval_every and step % args.eval_every == 0:
            begin_s = time.monotonic()
            row["accuracy"] = evaluate()
            eval_s += time.monotonic() - begin_s
        row["eval_s"] = eval_s
        row["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(row), flush=True)

    class Reporter(TrainerCallback):
        def on_step_end(self, _args: object, state: object, *_: object, **__: object) -> None:
            if state.global_step % 4 == 0:
                report(state.global_step // 4)

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows(args.train)),
        processing_class=tokenizer,
        callbacks=[Reporter()],
        args=GRPOConfig(
            output_dir=args.output,
            seed=args.seed,
            per_device_train_batch_size=96,
            steps_per_generation=4,
            gradient_accumulation_steps=1,
            num_generations=16,
            max_completion_length=40,
            max_steps=4 * args.steps,
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
        ),
    )
    report(0)
    trainer.train()


if __name__ == "__main__":
    main()
