"""Which Slurm jobs a run consists of, and how much of the nodes each takes.

    learner   one job: every rank, and the buffer as a step on the first node
    buffer    a job of its own instead, where the site has a [buffer] table
    actors    one array; each element is a job with actors_per_job engines

Rules only: config and site in, numbers and sentences out. launch.sbatch writes the scripts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dapo_hpc.config import ConfigProblems, RunConfig
from dapo_hpc.launch.site import JobTable, Site

JobKind = Literal["learner", "buffer", "actors"]

MAX_ELEMENTS = 1000
"""Of an array; Slurm's MaxArraySize is 1001 unless the cluster says otherwise."""
PLAIN_PATH = re.compile(r"[A-Za-z0-9._/+=@-]+")
"""Nothing in it means something to the shell, to sbatch (%), or between squeue's fields (|)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a run was submitted, and with which files: what a script needs to be written again."""

    directory: Path
    """Absolute; the $SLURM_SUBMIT_DIR of every job. Relative paths in scripts start here."""
    config: Path | None = None
    """From which a job makes the run when it is not there. None: it is there."""
    site: Path | None = None
    """None: the copy in the run directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """One job as it is asked for."""

    kind: JobKind
    title: str
    """What it is, for the head of its script."""
    run: Path
    """The run directory as the script names it."""
    site: Site
    table: JobTable
    nodes: int
    tasks_per_node: int
    cpus_per_task: int
    gpus_per_node: int
    """Asked for on each node; 0: none."""
    memory_gib: int
    """Asked for on each node; 0: all."""
    elements: int
    """Of the array; 0: no array."""
    words: tuple[str, ...]
    """`dapo job ...`."""

    @property
    def name(self) -> str:
        """Slurm's name of the job."""
        return job_name(self.run, self.kind)

    @property
    def gpus(self) -> int:
        """Of the job, or of all elements of the array."""
        return self.gpus_per_node * self.nodes * max(1, self.elements)


def job_name(run: Path, kind: JobKind) -> str:
    """`<run>.learner`: the same for every job of that kind, which is what singleton goes by."""
    return f"{run.name}.{kind}"


def comment(run: Path) -> str:
    """Tells a run's jobs from those of a run of the same name elsewhere; see belongs_to."""
    return f"dapo:{run}"


def belongs_to(run: Path, *, job_comment: str, directory: str) -> bool:
    """Whether a job, by its comment and the directory it was submitted in, is one of this run."""
    mark, _, path = job_comment.partition(":")
    return mark == "dapo" and (Path(directory) / path).resolve() == run.resolve()


def job_specs(config: RunConfig, site: Site, run: Path, origin: Origin) -> list[JobSpec]:
    """The jobs of a run, in the order of their submission.

    Args:
        config: of the run.
        site: of the cluster.
        run: its directory, absolute.
        origin: where and with what it is submitted.

    Raises:
        ConfigProblems: config and site do not fit together, a sentence for each reason.
    """
    problems = fit_problems(config, site, run)
    if problems:
        raise ConfigProblems(site.name, problems)
    shown = relative(run, origin.directory)
    options = ["--run", str(shown)]
    if origin.site:
        options += ["--site", str(relative(origin.site, origin.directory))]
    first = [_learner(config, site, shown, origin, options)]
    if site.buffer is not None:
        first.insert(0, _buffer(site, shown, options))
    return [*first, _actors(config, site, shown, options)]


def relative(path: Path, directory: Path) -> Path:
    """As seen from the directory if it lies below it, else absolute."""
    path = path if path.is_absolute() else directory / path
    return path.relative_to(directory) if path.is_relative_to(directory) else path


def world_size(config: RunConfig) -> int:
    """Processes of the learner."""
    learner = config.learner
    model = learner.tensor_parallel * learner.pipeline_parallel
    return model * learner.context_parallel * learner.data_parallel


def num_elements(actors: int, site: Site) -> int:
    """Array elements that hold so many actors."""
    return -(-actors // site.actors.actors_per_job)


# ------------------------------------------------------------------ one function for each kind


def _learner(
    config: RunConfig, site: Site, run: Path, origin: Origin, options: Sequence[str]
) -> JobSpec:
    world = world_size(config)
    ranks = ranks_per_node(config, site)
    nodes = world // ranks
    if origin.config:
        options = [*options, "--config", str(relative(origin.config, origin.directory))]
    beside = "" if site.buffer else ", with the buffer on the first node"
    return _spec(
        kind="learner",
        title=f"The learner of {run.name}: {_count(world, 'rank')} on {_count(nodes, 'node')}"
        f"{beside}.",
        run=run,
        site=site,
        nodes=nodes,
        tasks_per_node=ranks,
        gpus=min(ranks, site.learner.gpus_per_node),
        options=options,
    )


def _buffer(site: Site, run: Path, options: Sequence[str]) -> JobSpec:
    return _spec(
        kind="buffer",
        title=f"The buffer of {run.name}; for a site file with a [buffer] table.",
        run=run,
        site=site,
        nodes=1,
        tasks_per_node=1,
        gpus=0,
        options=options,
    )


def _actors(config: RunConfig, site: Site, run: Path, options: Sequence[str]) -> JobSpec:
    per_job = site.actors.actors_per_job
    elements = num_elements(config.rollout.num_actors, site)
    each = f"{_count(elements, 'job')} of {_count(per_job, 'engine')}"
    return _spec(
        kind="actors",
        title=f"The actors of {run.name}: {each}, each of which may come and go at any time.",
        run=run,
        site=site,
        nodes=1,
        tasks_per_node=per_job,
        gpus=per_job * config.rollout.tensor_parallel if site.actors.gpus_per_node else 0,
        options=options,
        elements=elements,
    )


def _spec(
    *,
    kind: JobKind,
    title: str,
    run: Path,
    site: Site,
    nodes: int,
    tasks_per_node: int,
    gpus: int,
    options: Sequence[str],
    elements: int = 0,
) -> JobSpec:
    """`gpus`: used on each node. With some of a node's GPUs go as many of its cores and memory."""
    table = site.tables()[kind]
    has = table.gpus_per_node
    takes_all = table.exclusive or not (has and gpus)
    share = 1.0 if takes_all else gpus / has
    return JobSpec(
        kind=kind,
        title=title,
        run=run,
        site=site,
        table=table,
        nodes=nodes,
        tasks_per_node=tasks_per_node,
        cpus_per_task=max(1, int(table.cpus_per_node * share) // tasks_per_node),
        gpus_per_node=has if table.exclusive and gpus else gpus,
        memory_gib=int(table.memory_gib * share),
        elements=elements,
        words=("dapo", "job", kind, *options),
    )


def ranks_per_node(config: RunConfig, site: Site) -> int:
    """Learner processes on each of its nodes."""
    world = world_size(config)
    return min(world, site.learner.ranks_per_node or site.learner.gpus_per_node or world)


# ------------------------------------------------------------------ refusals


def fit_problems(config: RunConfig, site: Site, run: Path) -> list[str]:
    """Why this run cannot be started on this cluster, a sentence for each reason."""
    found = _hardware_problems(config, site) + _engine_problems(config, site)
    found += actor_count_problems(config.rollout.num_actors, site, "rollout.num_actors")
    world, ranks = world_size(config), ranks_per_node(config, site)
    if world % ranks:
        found.append(
            f"the learner has {world} ranks (tensor * pipeline * context * data_parallel), which "
            f"do not fill nodes of {ranks}. Make their product a multiple of {ranks}, or set "
            "learner.ranks_per_node in the site file to a divisor."
        )
    if not PLAIN_PATH.fullmatch(str(run)):
        found.append(
            f"run directory {str(run)!r} holds a character with a meaning of its own in a batch "
            "script. Use letters, digits and . _ - + = @ in run.dir (or storage.runs)."
        )
    return found


def actor_count_problems(actors: int, site: Site, key: str) -> list[str]:
    """Why so many actors, asked for by `key`, cannot be had."""
    per_job = site.actors.actors_per_job
    if actors < 0:
        return [f"{key} = {actors}: expected 0 or more."]
    if actors % per_job:
        more = per_job * num_elements(actors, site)
        return [
            f"{key} = {actors} is not a multiple of actors.actors_per_job = {per_job}, so one job "
            f"would not be full. Set it to {more - per_job} or {more}."
        ]
    if num_elements(actors, site) > MAX_ELEMENTS:
        return [
            f"{key} = {actors} makes {num_elements(actors, site)} jobs, more than an array of "
            f"Slurm holds ({MAX_ELEMENTS}). Raise actors.actors_per_job."
        ]
    return []


def _hardware_problems(config: RunConfig, site: Site) -> list[str]:
    planned, learner, actors = (
        config.hardware.gpus_per_node,
        site.learner.gpus_per_node,
        site.actors.gpus_per_node,
    )
    found = []
    if planned != learner:
        found.append(
            f"hardware.gpus_per_node = {planned} in the config, but learner.gpus_per_node = "
            f"{learner} in the site file: `dapo check` would plan for other nodes. Set "
            f"hardware.gpus_per_node to {learner}."
        )
    if bool(planned) != bool(actors):
        found.append(
            f"hardware.gpus_per_node = {planned} in the config, but actors.gpus_per_node = "
            f"{actors} in the site file: the run is either on GPUs or on processors. Set both to "
            "0, or neither."
        )
    return found


def _engine_problems(config: RunConfig, site: Site) -> list[str]:
    tensor_parallel, table = config.rollout.tensor_parallel, site.actors
    needed = table.actors_per_job * tensor_parallel
    if not table.gpus_per_node or needed <= table.gpus_per_node:
        return []
    return [
        f"an actor job needs {needed} GPUs (actors.actors_per_job = {table.actors_per_job} * "
        f"rollout.tensor_parallel = {tensor_parallel}), but a node has {table.gpus_per_node}. "
        "Lower one of them; an engine does not span nodes."
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
