"""What the words of `dapo` do. Each command imports what it needs, and nothing before it is called.

Each takes the parsed words and returns the exit code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from dapo_hpc.config import RunConfig
    from dapo_hpc.plan import Plan

UNAVAILABLE = 1
"""Exit code when the same words may work later."""


def train(args: argparse.Namespace) -> int:
    from dapo_hpc.launch import session

    if args.resume:
        return session.resume(args.resume, args.overrides, "train")
    return session.train(_load(args), args.config)


def sft(args: argparse.Namespace) -> int:
    from dapo_hpc.launch import session

    if args.resume:
        return session.resume(args.resume, args.overrides, "sft")
    return session.sft(_load(args), args.config)


def evaluate(args: argparse.Namespace) -> int:
    from dapo_hpc.launch import session

    return session.evaluate(_load(args), args.model, args.config)


def submit(args: argparse.Namespace) -> int:
    from dapo_hpc.launch import submission

    if not args.source.is_dir():
        request = submission.from_files(args.source, args.site, args.overrides)
    elif args.overrides:
        raise ValueError(f"--set cannot be used here: {args.source} keeps its config.toml.")
    else:
        request = submission.from_run(args.source, args.site)
    if args.dry_run:
        print(submission.dry_run(request), end="")
        return 0
    return _through_slurm(lambda: submission.submit_scripts(request))


def scale(args: argparse.Namespace) -> int:
    from dapo_hpc.launch import scaling

    return _through_slurm(lambda: scaling.scale(args.run, args.actors))


def stop(args: argparse.Namespace) -> int:
    from dapo_hpc.launch import scaling

    return _through_slurm(lambda: scaling.stop(args.run, now=args.now))


def _through_slurm(command: Callable[[], str]) -> int:
    """Print what it returns. A controller that is away is no mistake of the user's."""
    from dapo_hpc.launch.slurm import SlurmUnavailable

    try:
        print(command())
    except SlurmUnavailable as away:
        print(away, file=sys.stderr)
        return UNAVAILABLE
    return 0


def doctor(args: argparse.Namespace) -> int:
    from dapo_hpc.launch.doctor import command, inside

    if args.inside:
        return inside.main(args.inside)
    return command.run(args.site, with_job=args.job, wait_s=args.wait, for_program=args.json)


def init(args: argparse.Namespace) -> int:
    from dapo_hpc import shipped

    print(shipped.copy_to(args.directory))
    return 0


def demo_data(args: argparse.Namespace) -> int:
    from dapo_hpc.demo import digits

    digits.write(args.out, args.seed)
    print(digits.description(args.out))
    return 0


def export_model(args: argparse.Namespace) -> int:
    from dapo_hpc.roles.startup import silence_megatron

    silence_megatron()
    from dapo_hpc.learner import convert

    convert.use_one_thread()
    print(convert.export_checkpoint(args.source, args.target, step=args.step, model=args.model))
    return 0


def import_model(args: argparse.Namespace) -> int:
    from dapo_hpc.roles.startup import silence_megatron

    silence_megatron()
    from dapo_hpc.learner import convert
    from dapo_hpc.learner.model import DTYPES

    convert.use_one_thread()
    dtype = DTYPES[args.dtype] if args.dtype else None
    print(convert.import_model(args.model, args.target, dtype=dtype))
    return 0


def status(args: argparse.Namespace) -> int:
    from dapo_hpc.launch.job_status import job_status
    from dapo_hpc.observe.status import status_text
    from dapo_hpc.run_dir import RunDir

    run = RunDir(args.run)
    print(status_text(run))
    if jobs := job_status(run):
        print(jobs)
    return 0


def watch(args: argparse.Namespace) -> int:
    from dapo_hpc.launch.watch import watch

    return watch(args.run)


def history(args: argparse.Namespace) -> int:
    from dapo_hpc.buffer.export import export
    from dapo_hpc.run_dir import RunDir

    run = RunDir(args.run)
    out = args.out or run.report
    num_groups, num_responses = export(run, out)
    print(f"{out}: {num_groups} groups, {num_responses} responses.")
    return 0


def report(args: argparse.Namespace) -> int:
    from dapo_hpc.observe import report
    from dapo_hpc.run_dir import RunDir

    print(report.draw(RunDir(args.run)))
    return 0


def check(args: argparse.Namespace) -> int:
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


def config_show(args: argparse.Namespace) -> int:
    from dapo_hpc.config import dump

    print(dump(_load(args)), end="")
    return 0


def job(args: argparse.Namespace) -> int:
    from dapo_hpc.launch.job import run_job

    return run_job(args.kind, run=args.run, config=args.config, site=args.site)


def role(args: argparse.Namespace) -> NoReturn:
    """Run one process of a run; what it says last is the last line of its log."""
    import os
    from importlib import import_module

    from dapo_hpc.caches import require_own_caches
    from dapo_hpc.config import load
    from dapo_hpc.observe import log
    from dapo_hpc.observe.final import Final, refusals_are_final
    from dapo_hpc.rank import Rank
    from dapo_hpc.run_dir import RunDir, write_text

    rank = Rank.of_step() if args.from_slurm else Rank(args.rank, args.world)
    own = {
        "buffer": {"ports": args.ports, "interface": args.interface},
        "actor": {"index": args.index, "idle_exit_s": args.idle_exit_s},
        "learner": {"rank": rank, "interface": args.interface},
        "sft": {"rank": rank},
        "evaluate": {"model": args.model},
    }.get(args.name, {})
    number = {"actor": args.index, "learner": rank.rank, "sft": rank.rank}.get(args.name)
    log.setup(args.name if number is None else f"{args.name}-{number}")
    run = RunDir(args.run)
    try:
        with refusals_are_final():
            require_own_caches(os.environ)
            config = load(run.config)
        module = import_module(f"dapo_hpc.roles.{args.name}")
        code = int(module.main(run, config, **own))
    except Exception as error:
        if args.final_mark and isinstance(error, Final):
            write_text(args.final_mark, log.cause_of(error) + "\n")
        log.exit_with_cause(error)
    log.exit_at_once(code)


def _load(args: argparse.Namespace) -> RunConfig:
    from dapo_hpc.config import load

    return load(args.config, args.overrides)
