"""The one command, `dapo`: parses first, imports what the command needs afterwards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dapo_hpc.run_dir import deny_others_writing

if TYPE_CHECKING:
    from dapo_hpc.config import RunConfig
    from dapo_hpc.plan import Plan

BAD_INPUT = 2
"""Exit code when nothing was started because of what the user gave."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit code."""
    args = parser().parse_args(argv)
    deny_others_writing()
    try:
        command: Callable[[argparse.Namespace], int] = args.command
        return command(args)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:
        return 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="dapo", description="DAPO reinforcement learning of language models."
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="command")
    _add_runs(verbs)
    _add_conversions(verbs)
    _add_looks(verbs)
    _add_role(verbs)
    return top


def _add_runs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = verbs.add_parser("train", help="train: buffer, learner and actors on this machine")
    source = train.add_mutually_exclusive_group(required=True)
    source.add_argument("config", nargs="?", type=Path, help="TOML file of a new run")
    source.add_argument("--resume", type=Path, metavar="RUN", help="run directory to go on with")
    _add_set(train)
    train.set_defaults(command=_train)

    sft = verbs.add_parser("sft", help="supervised fine-tuning; writes model.path")
    source = sft.add_mutually_exclusive_group(required=True)
    source.add_argument("config", nargs="?", type=Path, help="TOML file with an [sft] section")
    source.add_argument("--resume", type=Path, metavar="RUN", help="run directory to go on with")
    _add_set(sft)
    sft.set_defaults(command=_sft)

    evaluate = verbs.add_parser("eval", help="held-out accuracy of a Hugging Face directory")
    evaluate.add_argument("config", type=Path)
    evaluate.add_argument("--model", type=Path, required=True, help="directory to evaluate")
    _add_set(evaluate)
    evaluate.set_defaults(command=_eval)

    data = verbs.add_parser("demo-data", help="write the demo's prompts, pairs and model config")
    data.add_argument("out", type=Path, help="directory to write to")
    data.add_argument("--seed", type=int, default=0)
    data.set_defaults(command=_demo_data)


def _add_conversions(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = verbs.add_parser("export", help="a checkpoint becomes a Hugging Face directory")
    export.add_argument("source", type=Path, help="run directory, or one checkpoint")
    export.add_argument("target", type=Path, help="directory to write")
    export.add_argument("--step", type=int, help="checkpoint of the run (default: the newest)")
    export.add_argument(
        "--model", type=Path, help="where config and tokenizer are (default: the run's model)"
    )
    export.set_defaults(command=_export)

    import_ = verbs.add_parser("import", help="a Hugging Face directory becomes a checkpoint")
    import_.add_argument("model", type=Path, help="Hugging Face directory")
    import_.add_argument("target", type=Path, help="directory to write")
    import_.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="of the checkpoint (default: the model's)"
    )
    import_.set_defaults(command=_import)


def _add_looks(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = verbs.add_parser("status", help="where a run stands, from its files alone")
    status.add_argument("run", type=Path, help="run directory")
    status.set_defaults(command=_status)

    history = verbs.add_parser("history", help="what became of each prompt, as Parquet files")
    history.add_argument("run", type=Path, help="run directory")
    history.add_argument("--out", type=Path, help="directory to write (default: RUN/report)")
    history.set_defaults(command=_history)

    report = verbs.add_parser("report", help="draw a run's curves")
    report.add_argument("run", type=Path, help="run directory")
    report.set_defaults(command=_report)

    check = verbs.add_parser("check", help="the plan of a run and its problems; starts nothing")
    check.add_argument("config", type=Path)
    check.add_argument("--json", action="store_true", help="bytes and counts for a program")
    check.add_argument(
        "--build", action="store_true", help="also build each learner rank, without memory"
    )
    _add_set(check)
    check.set_defaults(command=_check)

    config = verbs.add_parser("config", help="`config show`: print a config with every value")
    config.add_argument("action", choices=["show"])
    config.add_argument("config", type=Path)
    _add_set(config)
    config.set_defaults(command=_config_show)


def _add_role(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """One process of a run; what the launchers start. Not in the list of commands."""
    role = verbs.add_parser("role")
    role.add_argument("name", choices=["prompts", "buffer", "actor", "learner", "sft", "evaluate"])
    role.add_argument("--run", type=Path, required=True)
    role.add_argument("--index", type=int, default=0)
    role.add_argument("--rank", type=int, default=0)
    role.add_argument("--world", type=int, default=1)
    role.add_argument("--model", type=Path)
    role.set_defaults(command=_role)


def _add_set(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        help="override one value of the config; may be repeated",
    )


# ------------------------------------------------------------------ commands


def _train(args: argparse.Namespace) -> int:
    from dapo_hpc.launch import session

    if args.resume:
        return session.resume(args.resume, args.overrides, "train")
    return session.train(_load(args), args.config)


def _sft(args: argparse.Namespace) -> int:
    from dapo_hpc.launch import session

    if args.resume:
        return session.resume(args.resume, args.overrides, "sft")
    return session.sft(_load(args), args.config)


def _eval(args: argparse.Namespace) -> int:
    from dapo_hpc.launch import session

    return session.evaluate(_load(args), args.model, args.config)


def _demo_data(args: argparse.Namespace) -> int:
    from dapo_hpc.demo import digits

    digits.write(args.out, args.seed)
    print(digits.description(args.out))
    return 0


def _export(args: argparse.Namespace) -> int:
    from dapo_hpc.roles.startup import silence_megatron

    silence_megatron()
    from dapo_hpc.learner import convert

    convert.use_one_thread()
    print(convert.export_checkpoint(args.source, args.target, step=args.step, model=args.model))
    return 0


def _import(args: argparse.Namespace) -> int:
    from dapo_hpc.roles.startup import silence_megatron

    silence_megatron()
    from dapo_hpc.learner import convert
    from dapo_hpc.learner.model import DTYPES

    convert.use_one_thread()
    dtype = DTYPES[args.dtype] if args.dtype else None
    print(convert.import_model(args.model, args.target, dtype=dtype))
    return 0


def _status(args: argparse.Namespace) -> int:
    from dapo_hpc.observe.status import status_text
    from dapo_hpc.run_dir import RunDir

    print(status_text(RunDir(args.run)))
    return 0


def _history(args: argparse.Namespace) -> int:
    from dapo_hpc.buffer.export import export
    from dapo_hpc.run_dir import RunDir

    run = RunDir(args.run)
    out = args.out or run.report
    num_groups, num_responses = export(run, out)
    print(f"{out}: {num_groups} groups, {num_responses} responses.")
    return 0


def _report(args: argparse.Namespace) -> int:
    from dapo_hpc.observe import report
    from dapo_hpc.run_dir import RunDir

    print(report.draw(RunDir(args.run)))
    return 0


def _check(args: argparse.Namespace) -> int:
    from dapo_hpc.config import ConfigProblems
    from dapo_hpc.plan import as_json, make_plan, print_plan

    plan = make_plan(_load(args), args.config.parent)
    if args.build:
        plan = _built(plan)
    if args.json:
        print(as_json(plan))
    else:
        print_plan(plan)
    if plan.problems:
        raise ConfigProblems(args.config.name, plan.problems)
    if not args.json:
        print(f"{args.config}: no problems.")
    return 0


def _built(plan: Plan) -> Plan:
    from dapo_hpc.roles.startup import silence_megatron

    silence_megatron()
    try:
        from dapo_hpc.learner.build_check import with_build
    except ModuleNotFoundError as absent:
        raise ValueError(
            f"dapo check --build needs what the learner needs, and {absent.name} is not installed. "
            "Leave --build out, or check where the learner runs."
        ) from None
    return with_build(plan)


def _config_show(args: argparse.Namespace) -> int:
    from dapo_hpc.config import dump

    print(dump(_load(args)), end="")
    return 0


def _role(args: argparse.Namespace) -> int:
    """Run one process of a run; whatever goes wrong is the last line of its log."""
    from importlib import import_module

    from dapo_hpc.config import load
    from dapo_hpc.observe import log
    from dapo_hpc.observe.final import refusals_are_final
    from dapo_hpc.run_dir import RunDir

    own = {
        "actor": {"index": args.index},
        "learner": {"rank": args.rank, "world": args.world},
        "sft": {"rank": args.rank, "world": args.world},
        "evaluate": {"model": args.model},
    }.get(args.name, {})
    number = own.get("index", own.get("rank"))
    log.setup(args.name if number is None else f"{args.name}-{number}")
    run = RunDir(args.run)
    try:
        with refusals_are_final():
            config = load(run.config)
        module = import_module(f"dapo_hpc.roles.{args.name}")
        return int(module.main(run, config, **own))
    except Exception as error:
        log.exit_with_cause(error)


def _load(args: argparse.Namespace) -> RunConfig:
    from dapo_hpc.config import load

    return load(args.config, args.overrides)


if __name__ == "__main__":
    sys.exit(main())
