"""How near the memory's limit are log-prob, entropy and their gradient, given logits?

    python perf/bench_logprob.py --minutes 3                  # on a GPU
    python perf/bench_logprob.py --output FOLDER              # small, on a CPU
    python perf/bench_logprob.py --only dapo_kernels TRL      # some of the providers

The peers start from the same logits: torch eager, torch.compile, TRL, flash-attn, Liger, Megatron,
QuACK; and Liger's GRPO loss, which goes on to the loss. See perf/PROTOCOL.md.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from dapo_kernels import backend, dapo_loss, logprob
from dapo_kernels.vocab import VocabShard
from kernel_bench import counts, eager, logits_peers
from kernel_bench.command import main
from kernel_bench.inputs import LogitsInputs, draw_logits
from kernel_bench.peers import need_triton
from kernel_bench.targets import BOTH, FORWARD, HALF, LOSS_OF_LOGITS, shard_task
from kernel_bench.task import OURS, Absent, Call, Provider, Results, Settings, Sizes, Task, Work

TOKENS = 8192
VOCAB = 151936
"""Qwen2.5's, of which no shard is a multiple of 128."""


def tasks(settings: Settings) -> list[Task]:
    """Most important first."""
    device = settings.device
    peers = logits_peers.all_both(device)
    near = tuple(peer for peer in peers if peer.name in ("TRL", "flash-attn"))
    whole = settings.sizes(TOKENS, VOCAB)
    shards = {ranks: settings.sizes(TOKENS, VOCAB // ranks) for ranks in (2, 4, 8)}
    return [
        forward(settings, whole, logits_peers.all_forward(device)),
        both(settings, BOTH, whole, peers),
        loss_of_logits(settings, whole),
        rows_alone(settings, whole),
        *(both(settings, shard_task(r), sizes, near, 4.0) for r, sizes in shards.items()),
        every_other_row(settings, whole),
        launches(settings, whole),
        forward_of_few(settings, settings.sizes(256, VOCAB)),
        both(settings, f"{BOTH}, an eighth of the tokens", settings.sizes(1024, VOCAB), near, 4.0),
        both(settings, f"{BOTH}, vocabulary of Llama 3", settings.sizes(TOKENS, 128256), near, 4.0),
        both(settings, f"{BOTH}, float32", whole, near, 6.0, torch.float32),
        both(settings, f"{BOTH}, 8 times the tokens", settings.sizes(65536, VOCAB), near, 8.0),
    ]


# ------------------------------------------------------------------ ours


def ours_forward(inputs: LogitsInputs) -> Call:
    def call() -> Results:
        with torch.no_grad():
            logprobs, entropy = logprob(inputs.logits, inputs.token_ids)
        return {"logprobs": logprobs, "entropy": entropy}

    return call


def ours_both(inputs: LogitsInputs, *, inplace: bool = True) -> Call:
    def call() -> Results:
        logits = inputs.leaf()
        logprobs, entropy = logprob(logits, inputs.token_ids, inplace_backward=inplace)
        grad = torch.autograd.grad(logprobs, logits, inputs.upstream)[0]
        return {"logprobs": logprobs, "entropy": entropy, "grad_logits": grad}

    return call


def ours_kept(inputs: LogitsInputs) -> Call:
    def call() -> Results:
        logits = inputs.leaf()
        logprobs, _ = logprob(logits, inputs.token_ids, keep=inputs.keep)
        grad = torch.autograd.grad(logprobs, logits, inputs.upstream)[0]
        return {"logprobs_kept": logprobs, "grad_logits_kept": grad}

    return call


def ours_loss(inputs: LogitsInputs) -> Call:
    given = inputs.loss

    def call() -> Results:
        logits = inputs.leaf()
        logprobs, entropy = logprob(logits, inputs.token_ids)
        loss, _ = dapo_loss(
            logprobs,
            given.old_logprobs,
            given.advantages,
            given.token_weights,
            clip_low=eager.CLIP_LOW,
            clip_high=eager.CLIP_HIGH,
            rollout_logprobs=given.rollout_logprobs,
            importance_cap=eager.IMPORTANCE_CAP,
            entropy=entropy.detach(),
        )
        return {"loss": loss, "grad_of_loss": torch.autograd.grad(loss, logits)[0]}

    return call


def row_kernel(kernel: str) -> Callable[[LogitsInputs], Call]:
    """One of the row operations alone, without autograd around it."""

    def bind(inputs: LogitsInputs) -> Call:
        logits, ids = inputs.logits, inputs.token_ids
        rows = backend.operations(logits)
        shard = VocabShard.of("perf", logits.shape[1], None, None)
        splits = rows.num_splits(len(logits), shard.num_columns)
        statistics = logits.new_empty((splits, len(logits), 4), dtype=torch.float32)
        rows.write_statistics(statistics, logits, ids, shard, 1.0)
        results = rows.combine(statistics, 1.0)

        def combine() -> Results:
            return {"logprobs": rows.combine(statistics, 1.0).logprobs}

        def write_statistics() -> Results:
            rows.write_statistics(statistics, logits, ids, shard, 1.0)
            return {"statistics": statistics}

        def write_gradient() -> Results:
            given = logits, ids, shard, 1.0, results, inputs.upstream, None, logits.dtype
            return {"grad_logits": rows.write_gradient(*given)}

        calls: dict[str, Call] = {
            "write_statistics": write_statistics,
            "combine": combine,
            "write_gradient": write_gradient,
        }
        return calls[kernel]

    return bind


def from_statistics(results: Results) -> Results:
    statistics = results["statistics"]
    return {"logprobs": backend.operations(statistics).combine(statistics, 1.0).logprobs}


FINISH = {"write_statistics": from_statistics}


def launched(kernel: str, warps: int, per_lane: int) -> Callable[[LogitsInputs], Call]:
    """The row operation with another shape of its launch; kernels/dapo_kernels/triton_ops.py."""
    wanted = {"LANES": 32 * warps, "ROW_WARPS": warps, "LOGITS_PER_LANE": per_lane}

    @contextlib.contextmanager
    def changed() -> Iterator[None]:
        from dapo_kernels import triton_ops

        missing = [name for name in wanted if not hasattr(triton_ops, name)]
        if missing:
            raise Absent(f"triton_ops has no {', '.join(missing)}")
        usual = {name: getattr(triton_ops, name) for name in wanted}
        vars(triton_ops).update(wanted)
        try:
            yield
        finally:
            vars(triton_ops).update(usual)

    def bind(inputs: LogitsInputs) -> Call:
        need_triton()
        with changed():
            usual_call = row_kernel(kernel)(inputs)

        def call() -> Results:
            with changed():
                return usual_call()

        return call

    return bind


def trl_kept(inputs: LogitsInputs) -> Call:
    function = logits_peers.trl()

    def call() -> Results:
        logits = inputs.leaf()
        logprobs, _ = function(logits, inputs.token_ids, row_mask=inputs.keep)
        grad = torch.autograd.grad(logprobs, logits, inputs.upstream)[0]
        return {"logprobs_kept": logprobs.detach(), "grad_logits_kept": grad}

    return call


# ------------------------------------------------------------------ tasks


def forward(settings: Settings, sizes: Sizes, peers: tuple[Provider, ...]) -> Task:
    ours = Provider(name=OURS, bind=ours_forward)
    work = counts.logprob_forward(sizes)
    return _task(settings, FORWARD, sizes, lambda _: work, (ours, *peers))


def forward_of_few(settings: Settings, sizes: Sizes) -> Task:
    """So few rows that one for each program would leave most of the card idle."""
    peers = logits_peers.all_forward(settings.device)
    near = (peer for peer in peers if peer.name in ("TRL", "flash-attn"))
    ours = Provider(name=OURS, bind=ours_forward)
    work = counts.logprob_forward(sizes)
    return _task(settings, f"{FORWARD}, few tokens", sizes, lambda _: work, (ours, *near), 3.0)


def both(
    settings: Settings,
    name: str,
    sizes: Sizes,
    peers: tuple[Provider, ...],
    seconds: float = 12.0,
    dtype: torch.dtype = torch.bfloat16,
) -> Task:
    ours = Provider(name=OURS, bind=ours_both, note="in place", destroys_inputs=True)
    kept = Provider(
        name=f"{OURS}, logits kept",
        bind=partial(ours_both, inplace=False),
        note="copies the logits, as TRL writes elsewhere",
    )
    work = counts.logprob_both(sizes, dtype.itemsize)
    own = (ours, kept) if name == BOTH else (ours,)
    return _task(settings, name, sizes, lambda _: work, (*own, *peers), seconds, dtype)


def loss_of_logits(settings: Settings, sizes: Sizes) -> Task:
    def work(inputs: Any) -> Work:
        return counts.loss_of_logits(sizes, moving=inputs.loss.moving_frac())

    ours = Provider(name=OURS, bind=ours_loss, note="in place", destroys_inputs=True)
    return _task(settings, LOSS_OF_LOGITS, sizes, work, (ours, *logits_peers.all_loss()), 12.0)


def statistics_work(sizes: Sizes) -> Work:
    """Logits and ids read; four statistics of each row written."""
    return Work(sizes.tokens * (2 * sizes.vocab + counts.ID + 4 * counts.FLOAT))


def rows_alone(settings: Settings, sizes: Sizes) -> Task:
    statistics = statistics_work(sizes)
    combine = Work(sizes.tokens * 8 * counts.FLOAT)
    gradient = counts.logprob_backward(sizes)
    providers = (
        Provider(
            name=f"{OURS} write_statistics",
            bind=row_kernel("write_statistics"),
            finish=from_statistics,
        ),
        Provider(name=f"{OURS} combine", bind=row_kernel("combine"), work=combine),
        Provider(
            name=f"{OURS} write_gradient",
            bind=row_kernel("write_gradient"),
            work=gradient,
            destroys_inputs=True,
        ),
    )
    return _task(settings, "row kernels alone", sizes, lambda _: statistics, providers, 4.0)


def launches(settings: Settings, sizes: Sizes) -> Task:
    """Is the shape of the launch that triton_ops has fixed the best one here?"""
    statistics, gradient = statistics_work(sizes), counts.logprob_backward(sizes)
    kernels = (("write_statistics", statistics, False), ("write_gradient", gradient, True))
    providers = tuple(
        Provider(
            name=f"{OURS} {kernel}, {warps} warps, {per_lane} logits a lane",
            bind=launched(kernel, warps, per_lane),
            work=work,
            finish=FINISH.get(kernel),
            destroys_inputs=destroys,
        )
        for kernel, work, destroys in kernels
        for warps in (4, 8, 16)
        for per_lane in (16, 32)
    )
    return _task(settings, "row kernels, launches", sizes, lambda _: statistics, providers, 6.0)


def every_other_row(settings: Settings, sizes: Sizes) -> Task:
    work = counts.logprob_both(sizes, kept=0.5)
    ours = Provider(name=OURS, bind=ours_kept, note="in place", destroys_inputs=True)
    trl = Provider(name="TRL", bind=trl_kept, note="not in place")
    return _task(settings, HALF, sizes, lambda _: work, (ours, trl), 4.0)


def _task(
    settings: Settings,
    name: str,
    sizes: Sizes,
    work: Callable[[Any], Work],
    providers: tuple[Provider, ...],
    seconds: float = 8.0,
    dtype: torch.dtype = torch.bfloat16,
) -> Task:
    return Task(
        name=name,
        sizes=sizes,
        work=work,
        draw=lambda wanted: draw_logits(wanted, settings.device, dtype),
        truth=eager.truth_of_logits,
        providers=providers,
        check=settings.check_sizes(),
        dtype=dtype,
        seconds=seconds,
    )


if __name__ == "__main__":
    sys.exit(main("logprob", __doc__, tasks))
