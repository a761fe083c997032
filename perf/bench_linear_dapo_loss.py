"""How near the matmul limit is the loss with its gradients, from hidden states?

    python perf/bench_linear_dapo_loss.py --minutes 4         # on a GPU
    python perf/bench_linear_dapo_loss.py --output FOLDER     # small, on a CPU

The limit is 6 T H V operations at the rate of a large matrix product in the same run. Ours gives
the loss with its gradients; the peers give log-probs and get the slope of the loss ready-made, or
know a summed cross-entropy alone. See perf/PROTOCOL.md.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch

from dapo_kernels import linear_dapo_loss, linear_logprob
from kernel_bench import counts, eager, linear_peers
from kernel_bench.command import main
from kernel_bench.inputs import LinearInputs, draw_linear
from kernel_bench.targets import BF16, HALF_ROWS, LINEAR, SCORING
from kernel_bench.task import OURS, Call, Provider, Results, Settings, Sizes, Task, Work

TOKENS, VOCAB, HIDDEN = 8192, 151936, 3584
"""Qwen2.5-7B's output layer."""


def tasks(settings: Settings) -> list[Task]:
    """Most important first."""
    whole = settings.sizes(TOKENS, VOCAB, HIDDEN)
    peers, scorers = linear_peers.all_both(), linear_peers.all_scoring()
    shards = {ranks: settings.sizes(TOKENS, VOCAB // ranks, HIDDEN) for ranks in (8, 4, 2)}
    wide = settings.sizes(TOKENS, VOCAB, 5120)
    long = settings.sizes(65536, VOCAB, HIDDEN)
    few = tuple(peer for peer in peers if peer.name in ("TRL", "verl", "bare products"))
    return [
        both(settings, LINEAR, whole, (*own_variants(), *peers), 30.0),
        scoring(settings, SCORING, whole, scorers, 10.0),
        both(settings, f"{LINEAR}, chunks", whole, own_chunks(), 8.0),
        *(
            both(settings, f"{LINEAR}, 1/{ranks} of the vocabulary", sizes, few, 5.0)
            for ranks, sizes in shards.items()
        ),
        both(settings, f"{LINEAR}, hidden size of Qwen2.5-32B", wide, few, 10.0),
        both(settings, f"{LINEAR}, 8 times the tokens", long, (), 6.0),
    ]


# ------------------------------------------------------------------ ours


def ours(inputs: LinearInputs, *, half: bool = False, **options: Any) -> Call:
    """The loss with its gradients; that of the weight goes into main_grad."""
    given, weight = inputs.loss, inputs.weight
    weights, suffix = given.token_weights, "_of_loss"
    if half:
        options, suffix = {**options, "rows": inputs.rows}, "_of_rows"
        weights = torch.zeros_like(weights).index_put_((inputs.rows,), weights[inputs.rows])

    def call() -> Results:
        hidden = inputs.leaf()
        weight.grad_added_to_main_grad = False
        loss, _ = linear_dapo_loss(
            hidden,
            weight,
            inputs.token_ids,
            given.old_logprobs,
            given.rollout_logprobs,
            given.advantages,
            weights,
            clip_low=eager.CLIP_LOW,
            clip_high=eager.CLIP_HIGH,
            importance_cap=eager.IMPORTANCE_CAP,
            **options,
        )
        # Autograd's gradient of the weight is the zeros that Megatron wants beside main_grad.
        grad, _ = torch.autograd.grad(loss, (hidden, weight))
        main_grad = weight.main_grad
        results = {f"grad_hidden{suffix}": grad, f"grad_weight{suffix}": main_grad}
        return results if half else {"loss": loss.detach(), **results}

    return call


def ours_in_two(inputs: LinearInputs) -> Call:
    """linear_logprob, for any loss: the backward computes the logits again."""
    weight = inputs.weight

    def call() -> Results:
        hidden = inputs.leaf()
        weight.grad_added_to_main_grad = False
        logprobs, entropy = linear_logprob(hidden, weight, inputs.token_ids)
        grad, _ = torch.autograd.grad(logprobs, (hidden, weight), inputs.upstream)
        main_grad = weight.main_grad
        named = {"logprobs": logprobs.detach(), "entropy": entropy.detach()}
        return {**named, "grad_hidden": grad, "grad_weight": main_grad}

    return call


def ours_scoring(inputs: LinearInputs, **options: Any) -> Call:
    def call() -> Results:
        with torch.no_grad():
            scored = linear_logprob(inputs.hidden, inputs.weight, inputs.token_ids, **options)
        return {"logprobs": scored[0], "entropy": scored[1]}

    return call


MAIN_GRAD = "gradient of weight into main_grad"


def own_variants() -> tuple[Provider, ...]:
    return (
        Provider(name=BF16, bind=partial(ours, logits_dtype=torch.bfloat16), note=MAIN_GRAD),
        Provider(
            name=f"{OURS}, linear_logprob",
            bind=ours_in_two,
            note=f"{MAIN_GRAD}; 8THV, any loss",
        ),
    )


def own_chunks() -> tuple[Provider, ...]:
    return tuple(
        Provider(
            name=f"{OURS}, chunks of {chunk}{', bf16 logits' if dtype else ''}",
            bind=partial(ours, chunk_tokens=chunk, logits_dtype=dtype),
            note=MAIN_GRAD,
        )
        for dtype in (None, torch.bfloat16)
        for chunk in (1024, 4096)
    )


# ------------------------------------------------------------------ tasks


def both(
    settings: Settings, name: str, sizes: Sizes, others: tuple[Provider, ...], seconds: float
) -> Task:
    work = counts.linear_loss(sizes)
    own: tuple[Provider, ...] = (Provider(name=OURS, bind=ours, note=MAIN_GRAD),)
    if name == LINEAR:
        half = partial(ours, half=True)
        some = counts.linear_loss(sizes, kept=0.5)
        own += (Provider(name=HALF_ROWS, bind=half, note=MAIN_GRAD, work=some),)
    return _task(settings, name, sizes, work, (*own, *others), seconds)


def scoring(
    settings: Settings, name: str, sizes: Sizes, others: tuple[Provider, ...], seconds: float
) -> Task:
    bf16 = partial(ours_scoring, logits_dtype=torch.bfloat16)
    own = Provider(name=OURS, bind=ours_scoring), Provider(name=BF16, bind=bf16)
    return _task(settings, name, sizes, counts.scoring(sizes), (*own, *others), seconds)


def _task(
    settings: Settings,
    name: str,
    sizes: Sizes,
    work: Work,
    providers: tuple[Provider, ...],
    seconds: float,
) -> Task:
    return Task(
        name=name,
        sizes=sizes,
        work=lambda _: work,
        draw=lambda wanted: draw_linear(wanted, settings.device, torch.bfloat16),
        truth=eager.truth_of_linear,
        providers=providers,
        check=settings.check_sizes(),
        seconds=seconds,
        launches=20,
    )


if __name__ == "__main__":
    sys.exit(main("linear_dapo_loss", __doc__, tasks))
