"""What a cluster asks of every run on it: one TOML file, `slurm/sites/<cluster>.toml`.

The tables say what a node of a partition has; how much of it a job takes follows from the config
of the run (launch.jobs).
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError

from dapo_hpc.config import ConfigProblems, Section
from dapo_hpc.config.loading import sentences
from dapo_hpc.config.sections import NonNegative, Positive, PositiveFloat

TIME_LIMIT = re.compile(
    r"(?:(?P<days>\d+)-(?P<day_hours>\d+)(?::(?P<day_minutes>\d+)(?::(?P<day_seconds>\d+))?)?"
    r"|(?P<hours>\d+):(?P<hour_minutes>\d+):(?P<hour_seconds>\d+)"
    r"|(?P<minutes>\d+)(?::(?P<minute_seconds>\d+))?)"
)
"""Slurm's six forms: D-H, D-H:M, D-H:M:S, H:M:S, M:S and M."""
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL", re.IGNORECASE)
"""Names of variables that nobody should see in `scontrol show job` or a job's log."""

Port = Annotated[int, Field(ge=1, le=65535)]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def time_limit_s(text: str) -> int:
    """Seconds of a time limit in Slurm's notation. Raises ValueError for any other text."""
    found = TIME_LIMIT.fullmatch(text)
    if found is None:
        raise ValueError('expected Slurm\'s notation, as in "24:00:00", "2-00:00:00" or "90"')

    def number(*names: str) -> int:
        return sum(int(found[name] or 0) for name in names)

    minutes = number("day_minutes", "hour_minutes", "minutes")
    hours = number("day_hours", "hours") + 24 * number("days")
    return number("day_seconds", "hour_seconds", "minute_seconds") + 60 * (minutes + 60 * hours)


def _checked_time_limit(text: str) -> str:
    time_limit_s(text)
    return text


class JobTable(Section):
    """Where jobs of one kind run, and what a node there has."""

    partition: str | None = None
    """None: the cluster's default."""
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features that the nodes must have, as --constraint takes them."""
    exclude: str | None = None
    """Nodes to stay away from, as --exclude takes them."""
    gpus_per_node: NonNegative = 0
    """0: no GPUs; cpus_per_node and memory_gib are then what a job takes of each of its nodes."""
    gpu_type: str | None = None
    """Slurm's name of it, as in --gpus-per-node=h100:8."""
    cpus_per_node: Positive
    """A job that takes some of a node's GPUs takes the same share of its cores and memory."""
    memory_gib: NonNegative = 0
    """0: --mem=0, all memory of each node."""
    exclusive: bool = False
    """Take nodes whole; then all their GPUs, cores and memory are asked for."""
    time_limit: Annotated[str, AfterValidator(_checked_time_limit)]
    """In Slurm's notation, at most that of the partition."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, word for word, as in "--reservation=night"."""


class LearnerTable(JobTable):
    """The learner's job; the buffer is a step on its first node unless there is a [buffer]."""

    ranks_per_node: Positive | None = None
    """Learner processes on a node. None: one for each GPU, or all on one node without GPUs."""
    successors: NonNegative = 0
    """Jobs submitted beforehand that take over one after another (--dependency=singleton), for
    clusters where a job may not requeue itself. 0: the job requeues itself."""


class ActorsTable(JobTable):
    """The array of actors; it may lie in a partition whose jobs are preempted at any time."""

    actors_per_job: Positive = 1
    """Engines in one element of the array; as many as fit where nodes are given out whole."""
    idle_exit_s: PositiveFloat = 1800.0
    """An actor without work for so long gives its GPUs back."""


class BufferTable(JobTable):
    """A job of its own for the buffer; it needs one or two cores and no GPU."""


class HandoverTable(Section):
    """How a job gives way before its time limit, and when it is preempted."""

    signal: Literal["USR2", "USR1", "TERM"] = "USR2"
    """That Slurm sends to the batch shell. NCCL may catch USR1."""
    before_s: Annotated[int, Field(gt=0, le=65535)] = 300
    """Time before the limit at which Slurm sends it; Slurm may be a minute early."""
    drain_s: PositiveFloat = 60.0
    """What the roles get to put their work away."""


class EnvironmentTable(Section):
    """What a job sets up before the program starts."""

    modules: tuple[str, ...] = ()
    """Of `module load`; the script then runs in a login shell, which knows the command."""
    lines: tuple[str, ...] = ()
    """Shell lines, word for word, as in "source .venv/bin/activate"."""
    prefix: tuple[str, ...] = ()
    """Words between srun's own and `dapo role ...` in every step: ["apptainer", "exec", "--nv",
    "image.sif"], or options of srun for Pyxis. `dapo job` itself runs outside the container, since
    it needs Slurm's commands and no torch."""
    variables: dict[VariableName, str] = {}
    """Exported in the script, so visible to everybody who can read it: no secrets."""
    passed: Annotated[tuple[VariableName, ...], Field(min_length=1)] = (
        "HOME",
        "USER",
        "PATH",
        "LANG",
    )
    """The only variables of the submitting shell that a job sees, beside Slurm's own."""


class NetworkTable(Section):
    """Which way the processes of a run reach each other."""

    interface: str | None = None
    """Of NCCL, gloo, the learner's meeting point and the buffer, as in "ib0". None: every address
    is tried."""
    port_range: tuple[Port, Port] | None = None
    """First and last port that the buffer may listen on. None: any free one."""


class StorageTable(Section):
    """Where files lie on this cluster."""

    runs: str | None = None
    """Directory of the run directories, in place of the config's run.dir; all nodes see it."""
    node_cache: str | None = None
    """Directory on the node's own disk for what compilers and engines cache; $USER and
    $SLURM_JOB_ID are replaced on the node."""


class Site(Section):
    """One cluster."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    jobs_may_submit: bool = True
    """Whether sbatch may be called on a compute node; the learner then replaces lost actors."""
    learner: LearnerTable
    actors: ActorsTable
    buffer: BufferTable | None = None
    """Present: the buffer is a job of its own. Absent: a step on the learner's first node."""
    handover: HandoverTable = HandoverTable()
    environment: EnvironmentTable = EnvironmentTable()
    network: NetworkTable = NetworkTable()
    storage: StorageTable = StorageTable()

    def tables(self) -> dict[str, JobTable]:
        """Job kind to its table."""
        tables: dict[str, JobTable] = {"learner": self.learner, "actors": self.actors}
        return tables if self.buffer is None else {**tables, "buffer": self.buffer}


def load_site(path: Path) -> Site:
    """Read a site file. Raises ConfigProblems with every problem found."""
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigProblems(str(path), ["there is no such file."]) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigProblems(str(path), [f"not TOML: {error}."]) from None
    try:
        site = Site.model_validate(table)
    except ValidationError as error:
        raise ConfigProblems(path.name, sentences(error, Site)) from None
    problems = _cross_checks(site)
    if problems:
        raise ConfigProblems(path.name, problems)
    return site


def _cross_checks(site: Site) -> list[str]:
    found = []
    for kind, table in site.tables().items():
        limit_s = time_limit_s(table.time_limit)
        if site.handover.before_s >= limit_s:
            found.append(
                f"handover.before_s = {site.handover.before_s} is not less than "
                f'{kind}.time_limit = "{table.time_limit}" ({limit_s} s): the job would hand over '
                "before it has worked. Lower handover.before_s, or raise the limit."
            )
        if table.gpu_type and not table.gpus_per_node:
            found.append(
                f'{kind}.gpu_type = "{table.gpu_type}", but {kind}.gpus_per_node is 0. Set the '
                "number of GPUs of a node, or leave the type out."
            )
    if site.handover.drain_s >= site.handover.before_s:
        found.append(
            f"handover.drain_s = {site.handover.drain_s:g} is not less than handover.before_s = "
            f"{site.handover.before_s}: the time limit would come before the work is put away. "
            "Raise handover.before_s."
        )
    ranks, gpus = site.learner.ranks_per_node, site.learner.gpus_per_node
    if ranks and gpus and ranks > gpus:
        found.append(
            f"learner.ranks_per_node = {ranks} is more than learner.gpus_per_node = {gpus}; every "
            "rank has a GPU of its own. Lower learner.ranks_per_node."
        )
    names = {*site.environment.passed, *site.environment.variables}
    for name in sorted(name for name in names if SECRET.search(name)):
        found.append(
            f"environment: {name} looks like a secret; what a job is given can be read by others "
            "(scontrol show job, logs). Leave it out, and let the program read a file in $HOME."
        )
    ports = site.network.port_range
    if ports and ports[0] > ports[1]:
        found.append(
            f"network.port_range = {list(ports)}: the first port is above the last. Exchange them."
        )
    return found
