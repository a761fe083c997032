"""Starting and supervising the processes of a run, on this machine or as Slurm jobs.

From Python: `from dapo_hpc.launch import submit`, see launch.submission.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from dapo_hpc.config import RunConfig
    from dapo_hpc.launch.site import Site
    from dapo_hpc.launch.submission import Submitted


def submit(
    config: RunConfig | str | os.PathLike[str], site: Site | str | os.PathLike[str]
) -> Submitted:
    """Submit a run through submitit, or what an earlier submission of it lacks. Safe to repeat.

    Args:
        config: the run, or its TOML file.
        site: the cluster, or its TOML file.

    Returns:
        submitit's object for each of the run's jobs.

    Raises:
        ConfigProblems: what is wrong with the files, or does not fit together.
        SlurmRefused: with Slurm's reason.
        SlurmUnavailable: the controller is away; call again later.
    """
    from dapo_hpc.launch import submission

    return submission.submit(config, site)
