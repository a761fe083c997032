"""The one command, `dapo`: its words. What they do is in commands.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dapo_hpc import commands
from dapo_hpc.run_dir import deny_others_writing

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
    _add_slurm(verbs)
    _add_doctor(verbs)
    _add_conversions(verbs)
    _add_looks(verbs)
    _add_job(verbs)
    _add_role(verbs)
    return top


def _add_runs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = verbs.add_parser("train", help="train: buffer, learner and actors on this machine")
    source = train.add_mutually_exclusive_group(required=True)
    source.add_argument("config", nargs="?", type=Path, help="TOML file of a new run")
    source.add_argument("--resume", type=Path, metavar="RUN", help="run directory to go on with")
    _add_set(train)
    train.set_defaults(command=commands.train)

    sft = verbs.add_parser("sft", help="supervised fine-tuning; writes model.path")
    source = sft.add_mutually_exclusive_group(required=True)
    source.add_argument("config", nargs="?", type=Path, help="TOML file with an [sft] section")
    source.add_argument("--resume", type=Path, metavar="RUN", help="run directory to go on with")
    _add_set(sft)
    sft.set_defaults(command=commands.sft)

    evaluate = verbs.add_parser("eval", help="held-out accuracy of a Hugging Face directory")
    evaluate.add_argument("config", type=Path)
    evaluate.add_argument("--model", type=Path, required=True, help="directory to evaluate")
    _add_set(evaluate)
    evaluate.set_defaults(command=commands.evaluate)

    data = verbs.add_parser("demo-data", help="write the demo's prompts, pairs and model config")
    data.add_argument("out", type=Path, help="directory to write to")
    data.add_argument("--seed", type=int, default=0)
    data.set_defaults(command=commands.demo_data)


def _add_slurm(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    submit = verbs.add_parser("submit", help="the same as Slurm jobs; again: what is missing")
    submit.add_argument("source", type=Path, help="TOML file of a run, or a run directory")
    submit.add_argument("--site", type=Path, required=True, help="TOML file of the cluster")
    submit.add_argument("--dry-run", action="store_true", help="print the batch scripts only")
    _add_set(submit)
    submit.set_defaults(command=commands.submit)

    scale = verbs.add_parser("scale", help="more or fewer actors, while the run goes on")
    scale.add_argument("run", type=Path, help="run directory")
    scale.add_argument("--actors", type=int, required=True, help="how many from now on")
    scale.set_defaults(command=commands.scale)

    stop = verbs.add_parser("stop", help="end a run's Slurm jobs; nothing finished is lost")
    stop.add_argument("run", type=Path, help="run directory")
    stop.add_argument("--now", action="store_true", help="cancel them, instead of asking them")
    stop.set_defaults(command=commands.stop)

    init = verbs.add_parser("init", help="copy the batch scripts, site files and configs to edit")
    init.add_argument("directory", type=Path, help="gets slurm/ and configs/")
    init.set_defaults(command=commands.init)


def _add_doctor(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = verbs.add_parser("doctor", help="whether a cluster and its site file go together")
    where = doctor.add_mutually_exclusive_group(required=True)
    where.add_argument("--site", type=Path, help="TOML file of the cluster")
    where.add_argument("--inside", type=Path, help=argparse.SUPPRESS)  # a node's part of the trial
    doctor.add_argument(
        "--job",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="try what only compute nodes can tell, by a small job of two nodes",
    )
    doctor.add_argument(
        "--wait", type=float, default=600.0, metavar="SECONDS", help="for that job (default: 600)"
    )
    doctor.add_argument("--json", action="store_true", help="the findings for a program")
    doctor.set_defaults(command=commands.doctor)


def _add_conversions(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = verbs.add_parser("export", help="a checkpoint becomes a Hugging Face directory")
    export.add_argument("source", type=Path, help="run directory, or one checkpoint")
    export.add_argument("target", type=Path, help="directory to write")
    export.add_argument("--step", type=int, help="checkpoint of the run (default: the newest)")
    export.add_argument(
        "--model", type=Path, help="where config and tokenizer are (default: the run's model)"
    )
    export.set_defaults(command=commands.export_model)

    import_ = verbs.add_parser("import", help="a Hugging Face directory becomes a checkpoint")
    import_.add_argument("model", type=Path, help="Hugging Face directory")
    import_.add_argument("target", type=Path, help="directory to write")
    import_.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="of the checkpoint (default: the model's)"
    )
    import_.set_defaults(command=commands.import_model)


def _add_looks(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = verbs.add_parser("status", help="where a run stands, from its files alone")
    status.add_argument("run", type=Path, help="run directory")
    status.set_defaults(command=commands.status)

    watch = verbs.add_parser("watch", help="see a run's steps as they come; Ctrl-C ends nothing")
    watch.add_argument("run", type=Path, help="run directory")
    watch.set_defaults(command=commands.watch)

    history = verbs.add_parser("history", help="what became of each prompt, as Parquet files")
    history.add_argument("run", type=Path, help="run directory")
    history.add_argument("--out", type=Path, help="directory to write (default: RUN/report)")
    history.set_defaults(command=commands.history)

    report = verbs.add_parser("report", help="draw a run's curves")
    report.add_argument("run", type=Path, help="run directory")
    report.set_defaults(command=commands.report)

    check = verbs.add_parser("check", help="the plan of a run and its problems; starts nothing")
    check.add_argument("config", type=Path)
    check.add_argument("--json", action="store_true", help="bytes and counts for a program")
    check.add_argument(
        "--build", action="store_true", help="also build each learner rank, without memory"
    )
    _add_set(check)
    check.set_defaults(command=commands.check)

    config = verbs.add_parser("config", help="`config show`: print a config with every value")
    config.add_argument("action", choices=["show"])
    config.add_argument("config", type=Path)
    _add_set(config)
    config.set_defaults(command=commands.config_show)


def _add_job(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """What a batch script runs. Not in the list of commands."""
    job = verbs.add_parser("job")
    job.add_argument("kind", choices=["train", "learner", "buffer", "actors"])
    job.add_argument("--run", type=Path, help="run directory (default: that of the config)")
    job.add_argument("--config", type=Path, help="make the run from it if it is not there")
    job.add_argument("--site", type=Path, help="of the cluster (default: the run's copy)")
    job.set_defaults(command=commands.job)


def _add_role(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """One process of a run; what the launchers start. Not in the list of commands."""
    role = verbs.add_parser("role")
    role.add_argument("name", choices=["prompts", "buffer", "actor", "learner", "sft", "evaluate"])
    role.add_argument("--run", type=Path, required=True)
    role.add_argument("--index", type=int, default=0)
    role.add_argument("--rank", type=int, default=0)
    role.add_argument("--world", type=int, default=1)
    role.add_argument("--model", type=Path)
    role.add_argument("--from-slurm", action="store_true", help="rank and world are the step's")
    role.add_argument("--interface", help="to be reached at, as in ib0 (default: any)")
    role.add_argument("--ports", type=_port_range, help="A-B: where the buffer may listen")
    role.add_argument("--idle-exit-s", type=float, help="leave after so long without work")
    role.add_argument("--final-mark", type=Path, help="written when another start is of no use")
    role.set_defaults(command=commands.role)


def _port_range(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last) + 1)


def _add_set(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        help="override one value of the config; may be repeated",
    )


if __name__ == "__main__":
    sys.exit(main())
