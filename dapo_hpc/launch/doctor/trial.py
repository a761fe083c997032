"""The trial: a job of two nodes for each kind of node the site names, and what came of it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from dapo_hpc.launch import slurm
from dapo_hpc.launch.doctor.cluster_view import ClusterView, Partition
from dapo_hpc.launch.doctor.findings import Finding, note, ok, problem
from dapo_hpc.launch.doctor.node_report import NodeReport
from dapo_hpc.launch.doctor.slurm_checks import find_partition
from dapo_hpc.launch.doctor.verdicts import judge
from dapo_hpc.launch.jobs import JobKind, JobSpec
from dapo_hpc.launch.sbatch import script_text
from dapo_hpc.launch.site import JobTable, Site
from dapo_hpc.launch.slurm import SlurmRefused, SlurmUnavailable

POLL_S = 1.0
TIME_LIMIT = "10"
CPUS = 4
MEMORY_GIB = 8
STALE_S = 30.0
"""How long the login node waits for a report after the job has ended: attribute caching."""
QUIET_S = 5.0
"""The same when the job's log is there already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    kind: JobKind
    table: JobTable
    nodes: int
    directory: Path
    """On the file system of the run directories; removed in the end."""
    job: str = ""

    @property
    def log(self) -> Path:
        return self.directory / "job.log"


def run_trials(
    site: Site, view: ClusterView, runs: Path, *, wait_s: float, tell: Callable[[str], None]
) -> Iterator[Finding]:
    """Submit a trial for each different table, wait for all of them, judge what they found.

    Args:
        site: as read from its file.
        view: what Slurm has; tables whose partition is wrong are left out, that is known already.
        runs: the run directories' parent.
        wait_s: how long a trial may wait and run before it is cancelled.
        tell: gets a line for a person about what is being waited for.
    """
    trials: list[Trial] = []
    is_new = not runs.exists()
    try:
        for trial in _plan(site, view, runs):
            try:
                trials.append(submit(trial, site))
            except (SlurmRefused, SlurmUnavailable, OSError) as refused:
                shutil.rmtree(trial.directory, ignore_errors=True)
                yield _refused(trial, refused)
        if trials:
            jobs = ", ".join(trial.job for trial in trials)
            tell(f"waiting for trial jobs {jobs}, {wait_s:g} s at most; Ctrl-C cancels them")
        deadline = time.monotonic() + wait_s
        unfinished = {trial.kind: _wait(trial, deadline) for trial in trials}
        ended = time.monotonic()
        for trial in trials:
            if queued := unfinished[trial.kind]:
                yield _late(trial, queued, wait_s)
            else:
                yield from finish(trial, site, ended)
    finally:
        for trial in trials:
            # After Ctrl-C as well: nothing of a trial is left in the queue or on the disk.
            with suppress(SlurmRefused, SlurmUnavailable):
                slurm.cancel([trial.job])
            shutil.rmtree(trial.directory, ignore_errors=True)
        if is_new:
            with suppress(OSError):
                runs.rmdir()


def _plan(site: Site, view: ClusterView, runs: Path) -> Iterator[Trial]:
    """Learner and actors, or one for both where their nodes are the same."""
    seen = set()
    kinds: tuple[tuple[JobKind, JobTable], ...] = (
        ("learner", site.learner),
        ("actors", site.actors),
    )
    for kind, table in kinds:
        partition = find_partition(kind, table, view)
        where = (table.partition, table.constraint, table.exclude, table.gpu_type)
        if isinstance(partition, Partition) and where not in seen:
            seen.add(where)
            directory = runs.absolute() / f".doctor-{kind}-{secrets.token_hex(4)}"
            nodes = min(2, partition.num_nodes)
            yield Trial(kind=kind, table=table, nodes=nodes, directory=directory)


def submit(trial: Trial, site: Site) -> Trial:
    """The same trial with its job id. Raises what launch.slurm.sbatch raises."""
    trial.directory.mkdir(parents=True, mode=0o700)
    (trial.directory / "site.toml").write_text(_site_toml(site))
    options = ["--no-requeue", f"--time={TIME_LIMIT}", f"--output={trial.log}"]
    job = slurm.sbatch(script(trial, site), *options, cwd=Path.cwd())
    return replace(trial, job=job)


def script(trial: Trial, site: Site) -> str:
    """The batch script: the same head and environment as a job of that table, a small step."""
    table, gpus = trial.table, min(1, trial.table.gpus_per_node)
    cpus = min(CPUS, table.cpus_per_node)
    step = ["srun", f"--nodes={trial.nodes}", f"--ntasks={trial.nodes}", "--ntasks-per-node=1"]
    # srun does not take over what the job asked for, since Slurm 22.05.
    step += [f"--cpus-per-task={cpus}", "--kill-on-bad-exit=0", *site.environment.prefix]
    spec = JobSpec(
        kind=trial.kind,
        title=f"dapo doctor: a trial of the nodes of [{trial.kind}].",
        run=trial.directory,
        site=site,
        table=table,
        nodes=trial.nodes,
        tasks_per_node=1,
        cpus_per_task=cpus,
        gpus_per_node=gpus,
        memory_gib=min(MEMORY_GIB, table.memory_gib or MEMORY_GIB),
        elements=0,
        words=(*step, "dapo", "doctor", "--inside", str(trial.directory)),
    )
    return script_text(spec)


def _site_toml(site: Site) -> str:
    import tomli_w

    return tomli_w.dumps(site.model_dump(mode="json", exclude_none=True))


def finish(trial: Trial, site: Site, ended: float) -> Iterator[Finding]:
    """What a trial says whose job has ended, at `ended` of the monotonic clock."""
    check = f"{trial.kind} trial"
    reports = _reports(trial, ended)
    if len(reports) < trial.nodes:
        missing = trial.nodes - len(reports)
        yield problem(
            check,
            f"job {trial.job} ended, and {missing} of {trial.nodes} nodes left no report. "
            f"{_last_lines(trial.log)}",
            "`dapo` must start on compute nodes: look at [environment] (modules, lines, prefix), "
            "and at storage.runs, which all nodes must see.",
        )
        if not reports:
            return
    hosts = " and ".join(report.host for report in reports)
    yield ok(check, f"job {trial.job} ran on {hosts}.")
    for found in judge(reports, site, trial.table):
        yield replace(found, check=f"{trial.kind} {found.check}")


def _late(trial: Trial, queued: slurm.QueuedJob, wait_s: float) -> Finding:
    return problem(
        f"{trial.kind} trial",
        f"job {trial.job} was {queued.state} ({queued.reason}) after {wait_s:g} s; it was "
        "cancelled.",
        "`squeue --start` tells when such a job may start: wait for a quieter hour, or let the "
        "trial wait longer (--wait SECONDS), or leave it out (--no-job).",
    )


def _wait(trial: Trial, deadline: float) -> slurm.QueuedJob | None:
    """None when it has ended; the job as Slurm has it when time is over."""
    while True:
        queued = slurm.queue(jobs=[trial.job])
        if not queued or queued[0].state == "COMPLETING":
            return None
        if time.monotonic() > deadline:
            return queued[0]
        time.sleep(POLL_S)


def _reports(trial: Trial, ended: float) -> list[NodeReport]:
    """Those that can be seen; waits for the others as long as attribute caching may hide them."""
    while True:
        found = []
        for rank in range(trial.nodes):
            with suppress(FileNotFoundError):
                text = (trial.directory / f"report-{rank}.json").read_text()
                found.append(NodeReport(**json.loads(text)))
        # A log without any report: the job died at its start, and the log says why.
        patience_s = QUIET_S if not found and trial.log.exists() else STALE_S
        if len(found) == trial.nodes or time.monotonic() > ended + patience_s:
            return found
        os.listdir(trial.directory)  # makes NFS ask the server again
        time.sleep(0.5)


def _last_lines(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except FileNotFoundError:
        return f"It left no log: the nodes may not see {log.parent}."
    return f"Its log ends: {' | '.join(lines[-3:])}" if lines else "Its log is empty."


def _refused(trial: Trial, refused: Exception) -> Finding:
    return problem(
        f"{trial.kind} trial",
        f"the trial job was not taken: {' '.join(str(refused).split())}",
        f"correct [{trial.kind}] of the site file, or leave the trial out (--no-job).",
    )


def left_out(reason: str) -> Finding:
    return note("trial", f"no trial job ({reason}): what compute nodes see is unknown.")
