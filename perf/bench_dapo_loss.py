"""What does the loss alone cost, given log-probs? It waits for its launch, not for memory.

    python perf/bench_dapo_loss.py --minutes 1                # on a GPU
    python perf/bench_dapo_loss.py --output FOLDER            # small, on a CPU

Loss, figures and gradient; from Python, and replayed from a CUDA graph. The peer is the same in
plain torch, eager and compiled: no library has this loss with these figures on its own. See
perf/PROTOCOL.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from dapo_kernels import backend, dapo_loss
from dapo_kernels.terms import STATISTICS, ClipRule, DapoLossStats, PolicyTokens
from kernel_bench import counts, eager
from kernel_bench.command import main
from kernel_bench.inputs import LossInputs, draw_loss
from kernel_bench.peers import need_gpu
from kernel_bench.targets import FEW, GRAPH, LOSS, ONE_LAUNCH
from kernel_bench.task import OURS, Call, Provider, Results, Settings, Sizes, Task

REPEATS = 20
Binder = Callable[[LossInputs], Call]


def tasks(settings: Settings) -> list[Task]:
    """Most important first; the last one counts kernels: the profiler slows what follows."""
    return [
        loss(settings, LOSS, settings.sizes(65536)),
        loss(settings, f"{LOSS}, 16 times the tokens", settings.sizes(1 << 20)),
        loss(settings, FEW, settings.sizes(8192), counts_kernels=True),
    ]


# ------------------------------------------------------------------ providers


def ours(inputs: LossInputs) -> Call:
    def call() -> Results:
        logprobs = inputs.logprobs.detach().requires_grad_()
        loss, stats = dapo_loss(
            logprobs,
            inputs.old_logprobs,
            inputs.advantages,
            inputs.token_weights,
            clip_low=eager.CLIP_LOW,
            clip_high=eager.CLIP_HIGH,
            rollout_logprobs=inputs.rollout_logprobs,
            importance_cap=eager.IMPORTANCE_CAP,
            entropy=inputs.entropy,
        )
        slope = torch.autograd.grad(loss, logprobs)[0]
        return {"loss": loss.detach(), "slope": slope, **_figures(stats)}

    return call


def one_launch(inputs: LossInputs) -> Call:
    """Loss, slope and figures in one kernel, without autograd around it."""
    rule = ClipRule(
        clip_low=eager.CLIP_LOW,
        clip_high=eager.CLIP_HIGH,
        dual_clip=0.0,
        importance_cap=eager.IMPORTANCE_CAP,
        kl_coef=0.0,
    )
    tokens = PolicyTokens(
        old_logprobs=inputs.old_logprobs,
        rollout_logprobs=inputs.rollout_logprobs,
        advantages=inputs.advantages,
        token_weights=inputs.token_weights,
        ref_logprobs=None,
        entropy=inputs.entropy,
    )
    kernel = backend.operations(inputs.logprobs).token_losses

    def call() -> Results:
        done = kernel(inputs.logprobs, tokens, rule)
        figures = done.figures[: 1 + len(STATISTICS)]
        return {"loss": done.loss, "slope": done.slope, "all_figures": figures}

    return call


def in_torch(function: Callable[[], Callable[..., tuple[Tensor, Tensor]]]) -> Binder:
    def bind(inputs: LossInputs) -> Call:
        loss_of = function()

        def call() -> Results:
            logprobs = inputs.logprobs.detach().requires_grad_()
            loss, figures = loss_of(
                logprobs,
                inputs.old_logprobs,
                inputs.rollout_logprobs,
                inputs.advantages,
                inputs.token_weights,
                inputs.entropy,
            )
            slope = torch.autograd.grad(loss, logprobs)[0]
            return {"loss": loss.detach(), "slope": slope, "figures": figures}

        return call

    return bind


@cache
def compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    need_gpu()
    return torch.compile(eager.dapo_loss, dynamic=False)


def graphed(bind: Binder, repeats: int) -> Binder:
    """The call captured `repeats` times in a CUDA graph, which is replayed."""

    def bind_graph(inputs: LossInputs) -> Call:
        need_gpu()
        call = bind(inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for _ in range(repeats):
                results = call()

        def replay() -> Results:
            graph.replay()
            return results

        return replay

    return bind_graph


def _figures(stats: DapoLossStats) -> Results:
    """By name; those that the plain version has as well."""
    return {name: getattr(stats, name) for name in eager.FIGURES}


def providers() -> tuple[Provider, ...]:
    plain = in_torch(lambda: eager.dapo_loss)
    many = f"of {REPEATS}"
    return (
        Provider(name=OURS, bind=ours),
        Provider(name=ONE_LAUNCH, bind=one_launch, note="without autograd"),
        Provider(name=f"{OURS}, graph", bind=graphed(ours, 1)),
        Provider(
            name=GRAPH,
            bind=graphed(one_launch, REPEATS),
            calls=REPEATS,
            note="one launch each; inputs in the cache",
        ),
        Provider(name="torch eager", bind=plain),
        Provider(name="torch eager, graph", bind=graphed(plain, 1)),
        Provider(name="torch.compile", bind=in_torch(compiled)),
        Provider(
            name=f"torch.compile, graph {many}",
            bind=graphed(in_torch(compiled), REPEATS),
            calls=REPEATS,
            note="inputs in the cache",
        ),
    )


# ------------------------------------------------------------------ tasks


def truth(inputs: LossInputs) -> Results:
    """The figures as a vector, each by name, and as the kernel writes them."""
    found = eager.truth_of_loss(inputs)
    named = dict(zip(eager.FIGURES, found["figures"], strict=True))
    zero = torch.zeros((), dtype=torch.float64)
    slots = [found["loss"], *(named.get(name, zero) for name in STATISTICS)]
    return {**found, **named, "all_figures": torch.stack(slots)}


def loss(settings: Settings, name: str, sizes: Sizes, counts_kernels: bool = False) -> Task:
    work = counts.dapo_loss(sizes)
    return Task(
        name=name,
        sizes=sizes,
        work=lambda _: work,
        draw=lambda wanted: draw_loss(wanted, settings.device),
        truth=truth,
        providers=providers(),
        check=settings.sizes(4096),
        dtype=torch.float32,
        seconds=6.0,
        launches=200,
        is_short=True,
        counts_kernels=counts_kernels,
    )


if __name__ == "__main__":
    sys.exit(main("dapo_loss", __doc__, tasks))
