"""The files that a user edits, slurm/ and configs/, wherever this package is installed."""

from __future__ import annotations

import shutil
from pathlib import Path

import dapo_hpc

FOLDERS = ("slurm", "configs")


def source_of(folder: str) -> Path:
    """In a wheel these folders lie inside the package; in a checkout, beside it."""
    package = Path(dapo_hpc.__file__).parent
    inside = package / "shipped_files" / folder
    return inside if inside.exists() else package.parent / folder


def copy_to(directory: Path) -> str:
    """Copy the folders; returns what a person reads. Raises ValueError rather than overwrite."""
    taken = [directory / folder for folder in FOLDERS if (directory / folder).exists()]
    if taken:
        raise ValueError(f"{taken[0]} is there already. Choose another directory, or move it away.")
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.py[co]")
        shutil.copytree(source_of(folder), directory / folder, ignore=ignored)
    return (
        f"{directory}/slurm and {directory}/configs are yours to edit.\n"
        "  Next: describe your cluster in a copy of slurm/sites/example.toml, then try\n"
        "  dapo submit configs/<run>.toml --site slurm/sites/<cluster>.toml --dry-run"
    )
