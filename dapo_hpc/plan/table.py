"""A plan for a person, or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dapo_hpc.plan.disk import DiskUse
from dapo_hpc.plan.engine import EngineMemory
from dapo_hpc.plan.memory import GIB, RankMemory, device_of
from dapo_hpc.plan.parameters import model_elements
from dapo_hpc.plan.plan import Plan

PLAIN_WIDTH = 110
"""Columns where the output is no terminal."""
MAX_STAGES = 4
"""Columns of the table of memory: the first pipeline stages and the last."""
NAME_WIDTH = 24
SHARES = {
    "weights": "weights",
    "gradients": "gradients, float32",
    "optimizer": "optimizer",
    "reference": "reference policy",
    "train_batch": "train batch",
    "activations": "activations",
    "head": "log-prob chunk",
    "backward": "backward of a layer",
    "allowance": "allowance, not derived",
}
"""Fields of RankMemory in words."""

Lines = list[tuple[str, str]]
"""Name and text; a text without a name goes on with the one before."""


@dataclass(frozen=True, slots=True)
class Unit:
    """In which the sizes of a section are shown."""

    name: str
    num_bytes: int

    @classmethod
    def of(cls, largest: int) -> Unit:
        return cls("GiB", GIB) if largest >= GIB else cls("MiB", 2**20)

    def text(self, size: int) -> str:
        return f"{size / self.num_bytes:,.1f}"

    def column(self, size: int) -> str:
        return f"{self.text(size):>8}"


def print_plan(plan: Plan, file: IO[str] | None = None) -> None:
    """Aligned columns; in colour on a terminal."""
    console = Console(file=file, highlight=False)
    if console.is_terminal:
        return _print(console, plan)
    console = Console(file=file, highlight=False, width=PLAIN_WIDTH, color_system=None)
    with console.capture() as captured:
        _print(console, plan)
    for line in captured.get().splitlines():
        print(line.rstrip(), file=file)
    return None


def as_json(plan: Plan) -> str:
    """Bytes and counts under the names of the classes in dapo_hpc.plan; null where unknown."""
    size, stages = plan.architecture, plan.learner
    table: dict[str, Any] = {
        "problems": plan.problems,
        "notes": plan.notes,
        "model": size and {**asdict(size), "parameters": model_elements(size)},
        "processes": {
            "learner": plan.learner_processes,
            "actors": plan.config.rollout.num_actors,
            "actor_gpus": plan.actor_gpus,
            "buffer": 1,
        },
        "step": asdict(plan.step),
        "learner_stages": stages and [{**asdict(s), "total": s.total} for s in stages],
        "engine": plan.engine and asdict(plan.engine),
        "disk": plan.disk and asdict(plan.disk),
    }
    return json.dumps(table, indent=2)


# ------------------------------------------------------------------ sections


def _print(console: Console, plan: Plan) -> None:
    where = "process" if device_of(plan.config) == "cpu" else "GPU"
    _section(console, "model", _model(plan))
    _section(console, "processes", _processes(plan))
    _section(console, "one rollout step", _step(plan))
    if plan.learner is not None:
        _learner_memory(console, f"a learner {where}", plan, plan.learner)
    if plan.engine is not None:
        unit = Unit.of(plan.engine.budget)
        _section(console, f"an actor's {where}, {unit.name}", _engine(plan, plan.engine, unit))
    if plan.disk is not None:
        unit = Unit.of(plan.disk.total)
        _section(console, f"disk, {unit.name}", _disk(plan, plan.disk, unit))
    for note in plan.notes:
        console.print(Text(f"note: {note}\n", style="yellow"))


def _model(plan: Plan) -> Lines:
    size = plan.architecture
    if size is None:
        return []
    tied = ", also the output layer" if size.is_tied else ""
    return [
        (size.name, f"{_count(model_elements(size))} parameters, {plan.config.model.dtype}"),
        ("", f"{size.num_layers} layers of {size.hidden}, feed-forward {size.ffn}"),
        ("", f"{size.heads} heads of {size.head_dim}, {size.kv_heads} for keys and values"),
        ("", f"vocabulary {size.vocab}{tied}"),
        ("", f"from {size.file}"),
    ]


def _processes(plan: Plan) -> Lines:
    rollout = plan.config.rollout
    each = f", each on {rollout.tensor_parallel} GPUs" if rollout.tensor_parallel > 1 else ""
    scorers = rollout.num_actors * plan.config.reward.workers
    return [
        ("learner", f"{plan.learner_processes}{_places(plan, plan.learner_processes)}"),
        *(("", line) for line in _layout(plan)),
        ("actors", f"{rollout.num_actors}{each}{_places(plan, plan.actor_gpus)}"),
        ("", _plural(scorers, "scoring worker")),
        ("buffer", "1"),
    ]


def _layout(plan: Plan) -> list[str]:
    learner = plan.config.learner
    axes = {
        "tensor": learner.tensor_parallel,
        "pipeline": learner.pipeline_parallel,
        "context": learner.context_parallel,
        "data": learner.data_parallel,
    }
    switches = {
        "sequence parallel": learner.sequence_parallel,
        "distributed optimizer": learner.distributed_optimizer,
        f"recompute {learner.recompute}": learner.recompute != "none",
        f"frozen: {', '.join(learner.freeze)}": learner.freeze,
    }
    lines = [
        [f"{name} {size}" for name, size in axes.items() if size > 1],
        [name for name, is_on in switches.items() if is_on],
    ]
    return [", ".join(words) for words in lines if words]


def _places(plan: Plan, gpus: int) -> str:
    nodes = plan.nodes(gpus)
    return f" ({_plural(gpus, 'GPU')} on {_plural(nodes, 'node')})" if nodes else ""


def _step(plan: Plan) -> Lines:
    step, rollout = plan.step, plan.config.rollout
    half = "with responses half as long"
    return [
        ("steps", f"{plan.config.run.total_steps:,}"),
        ("responses", f"{step.responses:,}: {rollout.prompts_per_step:,} x {rollout.group_size}"),
        ("tokens", f"at most {_count(step.max_tokens)}; {_count(step.half_tokens)} {half}"),
        ("updates", f"{step.updates}, each on {step.responses_per_update:,} responses"),
        (
            "micro-batches",
            f"of {plan.config.learner.micro_batch_tokens:,} tokens; an update and replica at most "
            f"{step.max_micro_batches:,}; {step.half_micro_batches:,} {half}",
        ),
    ]


def _engine(plan: Plan, engine: EngineMemory, unit: Unit) -> Lines:
    config = plan.config
    held = (
        f"{engine.cache_tokens:,} tokens: {engine.full_sequences:,} responses of full length, for "
        f"{config.rollout.max_sequences} places"
    )
    found = [
        ("weights", unit.column(engine.weights)),
        ("cache", f"{unit.column(engine.cache)}   {held}"),
    ]
    if device_of(config) == "cpu":
        return found
    frac, whole = config.rollout.gpu_memory_frac, config.hardware.gpu_memory_gib
    return [
        *found,
        (SHARES["allowance"], unit.column(engine.work)),
        (
            "total",
            f"{unit.column(engine.budget)}   rollout.gpu_memory_frac = {frac:g} of {whole:g}",
        ),
    ]


def _disk(plan: Plan, disk: DiskUse, unit: Unit) -> Lines:
    config = plan.config
    versions, kept = config.weights.keep_versions, config.learner.keep_checkpoints
    steps = config.learner.checkpoint_every * kept
    version, checkpoint, step = map(unit.text, (disk.version, disk.checkpoint, disk.step_payload))
    return [
        (
            "weights",
            f"{unit.column(disk.versions)}   {versions} versions and the next, {version} each",
        ),
        (
            "checkpoints",
            f"{unit.column(disk.checkpoints)}   {kept} and the next, {checkpoint} each",
        ),
        ("responses", f"{unit.column(disk.payload)}   of {steps} steps, at most {step} each"),
        ("total", unit.column(disk.total)),
    ]


def _learner_memory(console: Console, title: str, plan: Plan, all_stages: list[RankMemory]) -> None:
    """One column for each stage shown; what is not added stands in brackets."""
    numbers = list(range(len(all_stages)))
    if len(numbers) > MAX_STAGES:
        numbers = [*numbers[: MAX_STAGES - 1], numbers[-1]]
    stages = [all_stages[number] for number in numbers]
    unit = Unit.of(max(stage.total for stage in stages))
    table = _grid()
    for _ in stages:
        table.add_column(justify="right", min_width=8)
    heads = [f"stage {number + 1} " if len(all_stages) > 1 else "" for number in numbers]
    title = f"{title}, {unit.name}"
    table.add_row(Text(title, style="bold"), *(Text(head, style="bold") for head in heads))
    for field, words in SHARES.items():
        if any(getattr(stage, field) for stage in stages):
            table.add_row(f"  {words}", *(_share(stage, field, unit) for stage in stages))
    whole = plan.config.hardware.gpu_memory_gib
    is_limited = device_of(plan.config) != "cpu"
    totals = []
    for stage in stages:
        colour = ("green" if stage.total <= whole * GIB else "red") if is_limited else ""
        totals.append(Text(f"{unit.text(stage.total)} ", style=f"bold {colour}"))
    table.add_row("  total", *totals, f"  of {whole:g}" if is_limited else "")
    console.print(table)
    console.print("  in brackets: when the larger one is gone, so not added\n", style="dim")


def _share(stage: RankMemory, field: str, unit: Unit) -> str:
    size = int(getattr(stage, field))
    if not size:
        return ""
    text = unit.text(size)
    is_added = field not in ("head", "backward") or size == stage.passing
    return f"{text} " if is_added else f"({text})"


# ------------------------------------------------------------------ words


def _section(console: Console, title: str, lines: Lines) -> None:
    if not lines:
        return
    table = _grid()
    table.add_column()
    table.add_row(Text(title, style="bold"), "")
    for name, text in lines:
        table.add_row(f"  {name}", text)
    console.print(table)
    console.print()


def _grid() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(min_width=NAME_WIDTH, no_wrap=True)
    return table


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _count(number: int) -> str:
    """'21,504', '184.5 million', '32.8 billion'."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:,.1f} {word}"
    return f"{number:,}"
