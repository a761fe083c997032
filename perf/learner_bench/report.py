"""Figures of the teams, what is wanted of them, and one Markdown text."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from kernel_bench.clock import quantile

from .clock import PHASES
from .flops import of_batch
from .teams import Team, Turn

OURS = "ours"
TRAINED = ("update", "optimizer")
"""Phases of a training step; scoring is the third."""
Row = dict[str, Any]
AGREEMENT = {"float32": 1e-3, "bfloat16": 0.05}
"""Relative difference of the gradient norm from that of a plain step, from which on a team counts
as wrong. Rounding moves the norm of float32 by less than 1e-5; a wrong loss by about itself."""
COLUMNS = (
    "",
    "tokens/s trained",
    "p20 to p80",
    "with scoring",
    "trained per CPU s",
    "score ms",
    "update ms",
    "optimizer ms",
    "MFU",
    "MiB above imports",
    "peak MiB",
)


def rows_of(
    teams: dict[str, Team], sequences: list[tuple[int, int]], flops_per_s: float | None
) -> list[Row]:
    """One for each team that trains; the ceiling is of one process."""
    tokens = sum(prompt + response for prompt, response in sequences)
    trainers = {name: team for name, team in teams.items() if team.job.kind != "matmul"}
    reference = next(
        (t for t in trainers.values() if t.job.kind in ("padded", "by length") and t.turns), None
    )
    return [
        _row(name, t, tokens, sequences, flops_per_s, reference) for name, t in trainers.items()
    ]


def _row(
    name: str,
    team: Team,
    tokens: int,
    sequences: list[tuple[int, int]],
    flops_per_s: float | None,
    reference: Team | None,
) -> Row:
    job = team.job
    row: Row = {
        "team": name,
        "kind": job.kind,
        "processes": job.world,
        "layout": {"tensor": job.tensor, "pipeline": job.pipeline, "data": job.data},
        "dtype": job.dtype,
        "status": team.status,
        "reason": team.reason,
    }
    if not team.turns:
        return row
    row |= figures(team, tokens)
    if flops_per_s is not None:
        row |= utilisation(row, of_batch(job.architecture, sequences), flops_per_s * job.world)
    return row | _verdict(team, reference)


def figures(team: Team, tokens: int) -> Row:
    """Medians over the turns. Tokens are those of the batch, whatever the ranks share or pad."""
    trained_s = sorted(turn.seconds(*TRAINED) for turn in team.turns)

    def median(seconds: Callable[[Turn], float]) -> float:
        return statistics.median(seconds(turn) for turn in team.turns)

    return {
        "turns": len(team.turns),
        "tokens": tokens,
        "tokens_per_s": tokens / statistics.median(trained_s),
        "tokens_per_s_p20": tokens / quantile(trained_s, 0.8),
        "tokens_per_s_p80": tokens / quantile(trained_s, 0.2),
        "tokens_per_s_with_scoring": tokens / median(lambda turn: turn.seconds(*PHASES)),
        "tokens_per_cpu_s": tokens / median(lambda turn: turn.cpu_seconds(*TRAINED)),
        **_phases(team.turns),
        "extra_memory_mib": team.peak_mib - team.held_mib,
        "peak_memory_mib": team.peak_mib,
        "check": team.turns[0].check,
    }


def _phases(turns: list[Turn]) -> Row:
    found = {}
    for phase in PHASES:
        found[f"{phase}_ms"] = statistics.median(turn.seconds(phase) for turn in turns) * 1e3
        found[f"{phase}_cpu_ms"] = (
            statistics.median(turn.cpu_seconds(phase) for turn in turns) * 1e3
        )
    return found


def utilisation(row: Row, flops: dict[str, int], ceiling: float) -> Row:
    """FLOPs that the model needs over those that the processes could have multiplied."""
    train_s = (row["update_ms"] + row["optimizer_ms"]) / 1e3
    return {
        "flops_score": flops["score"],
        "flops_update": flops["update"],
        "mfu_train": flops["update"] / train_s / ceiling,
        "mfu_update": flops["update"] / (row["update_ms"] / 1e3) / ceiling,
        "mfu_score": flops["score"] / (row["score_ms"] / 1e3) / ceiling,
    }


def _verdict(team: Team, reference: Team | None) -> Row:
    """Whether the first measured step has the gradient of the plain one."""
    if reference is None:
        return {}
    mine, theirs = team.turns[0].check, reference.turns[0].check
    off = abs(mine["grad_norm"] - theirs["grad_norm"]) / theirs["grad_norm"]
    found: Row = {
        "grad_norm_off": off,
        "logprob_off": abs(mine["mean_logprob"] - theirs["mean_logprob"]),
    }
    if off > AGREEMENT[team.job.dtype] or mine["tokens"] != theirs["tokens"]:
        found["status"] = "wrong"
        found["reason"] = (
            f"gradient norm {mine['grad_norm']:.6g} over {mine['tokens']:.0f} tokens; the plain "
            f"step has {theirs['grad_norm']:.6g} over {theirs['tokens']:.0f}"
        )
    return found


# ------------------------------------------------------------------ targets


def targets_of(teams: dict[str, Team], device: str) -> list[Row]:
    """Ours in one process over each plain step: the median of the ratios of the same round."""
    ours = teams.get(OURS)
    bound = 1.0 if device == "cuda" else 0.8
    found = []
    for name, team in teams.items():
        if team.job.kind in ("padded", "by length"):
            ratios = _ratios(ours, team) if ours is not None else {}
            measured = ratios.get("tokens_per_s")
            met = None if measured is None else measured >= bound
            found.append({"beside": name, "bound": bound, **ratios, "met": met})
    return found


def _ratios(ours: Team, plain: Team) -> dict[str, float]:
    pairs = list(zip(ours.turns, plain.turns, strict=False))
    if not pairs:
        return {}

    def median(seconds: Callable[[Turn], float]) -> float:
        return statistics.median(seconds(there) / seconds(here) for here, there in pairs)

    return {
        "tokens_per_s": median(lambda turn: turn.seconds(*TRAINED)),
        "tokens_per_s_with_scoring": median(lambda turn: turn.seconds(*PHASES)),
        "tokens_per_cpu_s": median(lambda turn: turn.cpu_seconds(*TRAINED)),
        "score": median(lambda turn: turn.seconds("score")),
        "update": median(lambda turn: turn.seconds("update")),
        "optimizer": median(lambda turn: turn.seconds("optimizer")),
    }


# ------------------------------------------------------------------ text


def markdown(found: dict[str, Any]) -> str:
    machine, rows = found["machine"], found["rows"]
    lines = [f"# A learner's step on {machine.get('gpu') or machine['cpu']}", ""]
    lines += _header(found)
    lines += ["", _cells(COLUMNS), "|" + "---|" * len(COLUMNS)]
    lines += [_cells(_line(row)) for row in rows if "tokens_per_s" in row]
    others = [f"* {row['team']}: {row['status']}: {row['reason']}" for row in rows if row["reason"]]
    lines += ["", *others] if others else []
    return "\n".join([*lines, "", *_targets(found["targets"])]) + "\n"


def _header(found: dict[str, Any]) -> list[str]:
    machine, load, batch = found["machine"], found["load"], found["batch"]
    rate = found["matmul_flops_per_s"]
    versions = ("torch", "transformers", "megatron-core", "python")
    return [
        f"{machine['date']}, commit {machine['commit']}; "
        f"{', '.join(f'{name} {machine[name]}' for name in versions)}; {machine['cores']} cores, "
        f"{found['threads']} threads for each process; load average "
        f"{machine['load_average']:.1f} before and {found['load_average_after']:.1f} after.",
        "",
        f"Model `{found['model']}`: {found['parameters'] / 1e6:.1f} million parameters, "
        f"{found['dtype']}. Batch: {batch['sequences']} sequences, {batch['tokens']} tokens, "
        f"{batch['response_tokens']} of them in responses of {batch['shortest']} to "
        f"{batch['longest']}; {load['micro_batch_tokens']} places in a micro-batch. "
        + ("Matmul not measured." if rate is None else f"Matmul {rate / 1e9:.4g} GFLOP/s."),
        "",
        f"Medians of {found['rounds']} rounds, every team one step in each. Trained: forward, "
        "backward and optimizer; MFU of the same, over the matmul rate of all processes; memory "
        "of the largest process.",
    ]


def _line(row: Row) -> tuple[str, ...]:
    mfu = f"{row['mfu_train']:.1%}" if "mfu_train" in row else "-"
    return (
        row["team"] + (" (wrong)" if row["status"] == "wrong" else ""),
        f"{row['tokens_per_s']:.0f}",
        f"{row['tokens_per_s_p20']:.0f} to {row['tokens_per_s_p80']:.0f}",
        f"{row['tokens_per_s_with_scoring']:.0f}",
        f"{row['tokens_per_cpu_s']:.0f}",
        *(f"{row[f'{phase}_ms']:.1f}" for phase in PHASES),
        mfu,
        f"{row['extra_memory_mib']:.0f}",
        f"{row['peak_memory_mib']:.0f}",
    )


def _targets(targets: list[Row]) -> list[str]:
    head = ("ours, one process, beside", "wanted", "trained", "with scoring", "trained, CPU s")
    head += (*PHASES, "")
    words = {True: "met", False: "**not met**", None: "not measured"}
    names = ("tokens_per_s", "tokens_per_s_with_scoring", "tokens_per_cpu_s", *PHASES)
    lines = ["## Times as fast", "", _cells(head), "|" + "---|" * len(head)]
    for target in targets:
        seen = [f"{target[name]:.2f}" if name in target else "-" for name in names]
        wanted = f"at least {target['bound']:g}"
        lines.append(_cells((target["beside"], wanted, *seen, words[target["met"]])))
    return lines


def _cells(words: tuple[str, ...]) -> str:
    return "| " + " | ".join(words) + " |"
