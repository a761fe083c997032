"""`dapo doctor --site SITE`: whether this cluster and a site file go together, and what to do.

On the login node it asks Slurm and looks at directories; then a small job of two nodes tries what
only compute nodes can tell. Checks are functions: what is known goes in, Findings come out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dapo_hpc.launch import slurm
from dapo_hpc.launch.doctor import host_checks, settings_checks, slurm_checks, trial
from dapo_hpc.launch.doctor.cluster_view import look
from dapo_hpc.launch.doctor.findings import Finding, has_problems
from dapo_hpc.launch.site import Site

DEFAULT_RUNS = "runs"
PATIENCE_S = 15.0
"""How long an absent controller is waited for: here its absence is an answer."""


def diagnose(
    site: Site, *, with_job: bool, wait_s: float, tell: Callable[[str], None]
) -> Iterator[Finding]:
    """Every finding, as it comes. Submits nothing without `with_job`; see trial.run_trials."""
    runs = Path(site.storage.runs or DEFAULT_RUNS)
    yield from _this_host(site, runs)
    commands = slurm_checks.check_commands()
    yield commands
    if has_problems([commands]):
        return
    controller = slurm_checks.check_controller(_run)
    yield controller
    if has_problems([controller]):
        return
    view = look(_run)
    tables = list(slurm_checks.check_site(site, view))
    yield from tables
    if not has_problems(tables):
        for kind, table in site.tables().items():
            yield slurm_checks.check_submission(kind, table, _run)
    yield from settings_checks.check_settings(site, view, _run)
    if with_job:
        yield from trial.run_trials(site, view, runs, wait_s=wait_s, tell=tell)
    else:
        yield trial.left_out("--no-job")


def _this_host(site: Site, runs: Path) -> Iterator[Finding]:
    yield from host_checks.check_runs_directory(runs)
    yield host_checks.check_proxies(os.environ, site.environment.passed)
    yield host_checks.check_interface_here(site.network.interface, host_checks.interface_names)


def _run(words: Sequence[str]) -> str:
    return slurm.run(words, patience_s=PATIENCE_S)
