"""`dapo submit`: from a config and a site file to the jobs of a run. Twice is once.

Nothing keeps running here: the jobs find everything in the run directory.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dapo_hpc.buffer.auth import create_auth
from dapo_hpc.config import ConfigProblems, RunConfig, load
from dapo_hpc.launch import lives, prepare, slurm
from dapo_hpc.launch.jobs import JobSpec, Origin, job_specs
from dapo_hpc.launch.repair import (
    KINDS,
    Repaired,
    Send,
    keep_origin,
    keep_site,
    queued,
    repair,
    site_file,
)
from dapo_hpc.launch.sbatch import file_name, script_text
from dapo_hpc.launch.site import Site, load_site
from dapo_hpc.observe.status import is_locked
from dapo_hpc.plan import make_plan
from dapo_hpc.run_dir import RunDir, deny_others_writing

if TYPE_CHECKING:
    from dapo_hpc.launch.executor import RunSlurmJob

NEEDED = ("model.path", "model.imported", "prompts.train", "prompts.eval")


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """The jobs of a run as submitit's objects: `.state`, `.cancel()`, `.done()`, `.result()`."""

    run: RunDir
    learner: list[RunSlurmJob]
    """The one that runs or will run first, then its successors."""
    buffer: RunSlurmJob | None
    """None while it is a step of the learner's job."""
    actors: list[RunSlurmJob]
    """One for each element of the array, in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be submitted."""

    run: RunDir
    """Absolute; it need not be there."""
    config: RunConfig
    site: Site
    origin: Origin
    folder: Path
    """Of the config's file; `dapo check` looks for models there."""


def from_files(source: Path, site: Path, overrides: list[str]) -> Request:
    """A new run, or one that was submitted before, by its config."""
    # A script cannot say --set: the run directory, which is made first, keeps the values.
    shown = None if overrides else source
    return _from_config(load(source, overrides), load_site(site), shown, site, source.parent)


def from_run(root: Path, site: Path) -> Request:
    """A run that is there, with the site file to use from now on."""
    run, config = prepare.open_run(root, "train")
    return Request(
        run=run, config=config, site=load_site(site), origin=_origin(None, site), folder=run.root
    )


def dry_run(request: Request) -> str:
    """The scripts that would be submitted, each under its name. Writes nothing."""
    parts = [f"==> {file_name(spec)} <==\n{script_text(spec)}" for spec in _specs(request)]
    return "\n".join(parts)


def submit_scripts(request: Request) -> str:
    """Make the run if it is not there, and submit what it lacks. Returns what a person reads."""
    _require_command(request.site)
    run = _make(request)
    return _report(run, repair(run, request.site))


def submit(
    config: RunConfig | str | os.PathLike[str], site: Site | str | os.PathLike[str]
) -> Submitted:
    """As dapo_hpc.launch.submit says. This process makes no file that others may write any more."""
    from dapo_hpc.launch import executor

    deny_others_writing()
    source = None if isinstance(config, RunConfig) else Path(config)
    parsed = load(source) if source else config
    site_path = None if isinstance(site, Site) else Path(site)
    table = load_site(site_path) if site_path else site
    assert isinstance(parsed, RunConfig), "a config is a RunConfig or the path of its file"
    assert isinstance(table, Site), "a site is a Site or the path of its file"
    folder = source.parent if source else Path.cwd()
    run = _make(_from_config(parsed, table, source, site_path, folder))
    made: dict[str, RunSlurmJob] = {}
    send: Send = executor.send_through_submitit(run, made)
    repaired = repair(run, table, send=send)
    return _submitted(run, repaired, made)


# ------------------------------------------------------------------ steps of both


def _from_config(
    config: RunConfig, site: Site, source: Path | None, site_path: Path | None, folder: Path
) -> Request:
    if site.storage.runs:
        section = config.run.model_copy(update={"dir": site.storage.runs})
        config = config.model_copy(update={"run": section})
    return Request(
        run=RunDir(config.run_dir.absolute()),
        config=config,
        site=site,
        origin=_origin(source, site_path),
        folder=folder,
    )


def _origin(source: Path | None, site: Path | None) -> Origin:
    return Origin(
        directory=Path.cwd(),
        config=source.absolute() if source else None,
        site=site.absolute() if site else None,
    )


def _specs(request: Request) -> list[JobSpec]:
    """Raises ConfigProblems for what `dapo check` objects to, and what the site cannot give."""
    problems = make_plan(request.config, request.folder).problems
    if problems:
        raise ConfigProblems(request.config.run.name, problems)
    return job_specs(request.config, request.site, request.run.root, request.origin)


def _make(request: Request) -> RunDir:
    """The run directory with everything the jobs need; an existing one of the same config stays."""
    _specs(request)
    missing = prepare.missing_files(request.config, NEEDED)
    if missing:
        raise ConfigProblems(request.config.run.name, missing)
    run = request.run
    try:
        if not run.config.exists():
            prepare.create_run(request.config, "train")
    except prepare.RunExists:
        pass  # somebody else has made it since we looked
    _require_same(run, request.config)
    _require_free(run)
    _require_layout(run, request.site)
    if not run.auth.exists():
        create_auth(run)
    run.logs.mkdir(exist_ok=True)
    keep_site(run, request.site)
    keep_origin(run, request.origin)
    lives.clear_stop(run)
    return run


def _require_same(run: RunDir, config: RunConfig) -> None:
    """A run keeps its config; another one is refused, with the first key that differs."""
    _, kept = prepare.open_run(run.root, "train")
    ours = prepare.with_absolute_paths(config).model_dump()
    for section, table in kept.model_dump().items():
        other = ours[section]
        if table == other:
            continue
        key = next((k for k in table if table[k] != other[k]), "") if table and other else ""
        name = f"{section}.{key}" if key else section
        raise ValueError(
            f"{run.root} holds a run with another config: {name} is "
            f"{table[key] if key else table!r} there, and {other[key] if key else other!r} here.\n"
            f"  To go on with it as it is: dapo submit {run.root} --site <site file>\n"
            "  To start another one, name it: --set run.name=<another name>"
        )


def _require_free(run: RunDir) -> None:
    """Neither `dapo train` nor a job with everything in it works here, else two would learn."""
    if is_locked(run.lock):
        raise ValueError(
            f"{run.root} is being trained by `dapo train`. Stop that first; this goes on with it."
        )
    trains = [life.address for life in lives.read_lives(run) if life.kind == "train"]
    living = slurm.queue(jobs=trains) if trains else []
    if living:
        raise ValueError(
            f"{run.root} is being trained in one allocation, by job {living[0].address}. Wait for "
            f"its end, or stop it first: dapo stop {run.root}"
        )


def _require_layout(run: RunDir, site: Site) -> None:
    """While jobs of the run live, another site file may not change what their numbers mean."""
    if not site_file(run).exists():
        return
    kept = load_site(site_file(run))
    changes = {
        "actors.actors_per_job": (kept.actors.actors_per_job, site.actors.actors_per_job),
        "[buffer]": (kept.buffer is not None, site.buffer is not None),
    }
    changed = [name for name, (before, after) in changes.items() if before != after]
    if changed and queued(run):
        raise ValueError(
            f"{changed[0]} of the site file differs from {site_file(run)}, by which its jobs "
            f"run. Stop them first: dapo stop {run.root}"
        )


def _require_command(site: Site) -> None:
    environment = site.environment
    is_set_up = environment.modules or environment.lines or "PATH" in environment.variables
    if not is_set_up and shutil.which("dapo") is None:
        raise ValueError(
            "`dapo` is not in PATH, so the jobs would not find it. Activate its environment "
            "before you submit, or let the site file do it: environment.lines = "
            '["source /path/to/.venv/bin/activate"].'
        )


def _report(run: RunDir, repaired: Repaired) -> str:
    shown = Path(os.path.relpath(run.root))
    if run.model.exists():
        return f"The run is complete already. Model: {run.model}"
    lines = [f"run directory: {shown}"]
    for sent in repaired.sent:
        lines.append(f"  {sent.kind:8} job {sent.job_id} submitted{_elements(sent.elements)}")
    for job in repaired.kept:
        lines.append(f"  {job.name.rpartition('.')[2]:8} job {job.address} {job.state.lower()}")
    lines += [f"  cancelled, since it was there twice: {job}" for job in repaired.cancelled]
    if not repaired.sent:
        lines.append("Nothing was missing.")
    return "\n".join(
        [
            *lines,
            f"where it stands:  dapo status {shown}",
            f"more or fewer:    dapo scale {shown} --actors N",
            f"to stop it:       dapo stop {shown}",
        ]
    )


def _elements(elements: tuple[int, ...]) -> str:
    if not elements:
        return ""
    return f", {len(elements)} element{'s' * (len(elements) > 1)} of the array"


def _submitted(run: RunDir, repaired: Repaired, made: dict[str, RunSlurmJob]) -> Submitted:
    from dapo_hpc.launch.executor import RunSlurmJob

    jobs = {kind: dict[int, RunSlurmJob]() for kind in KINDS}
    for job in repaired.kept:
        kind = next(k for k in KINDS if job.name.endswith(f".{k}"))
        number = int(job.job_id) if job.task is None else job.task
        jobs[kind][number] = RunSlurmJob(folder=run.jobs, job_id=job.address)
    for sent in repaired.sent:
        numbers = {element: f"{sent.job_id}_{element}" for element in sent.elements}
        for number, address in (numbers or {int(sent.job_id): sent.job_id}).items():
            jobs[sent.kind][number] = made[address]
    ordered = {kind: [found[n] for n in sorted(found)] for kind, found in jobs.items()}
    return Submitted(
        run=run,
        learner=ordered["learner"],
        buffer=next(iter(ordered["buffer"]), None),
        actors=ordered["actors"],
    )
