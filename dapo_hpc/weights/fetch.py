"""The actor's side of the weights: a published version, verified before anything loads it."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from dapo_hpc.records import PolicyVersion
from dapo_hpc.weights.manifest import WeightManifest, WeightMismatch, verify

SECOND_LOOK_S = 1.0
"""A shared file system may show a new file's old content for a moment."""

_log = logging.getLogger(__name__)


def fetch(weights_dir: Path, version: PolicyVersion) -> tuple[Path, WeightManifest]:
    """The directory and manifest of a published version, every tensor's digest checked.

    Raises:
        FileNotFoundError: the version is not there; ask the buffer for the newest one.
        WeightMismatch: what is there is not what the learner wrote, also on a second look.
    """
    directory = weights_dir / version.name
    try:
        manifest = _verified(directory, version)
    except WeightMismatch as mismatch:
        _log.warning("%s Looking again in %g s.", mismatch, SECOND_LOOK_S)
        time.sleep(SECOND_LOOK_S)
        manifest = _verified(directory, version)
    return directory, manifest


def _verified(directory: Path, version: PolicyVersion) -> WeightManifest:
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is not there: the version was never published, or deleted since (see "
            "weights.keep_versions)."
        )
    manifest = verify(directory)
    if manifest.version != version:
        raise WeightMismatch(
            f"weights {version.name}: the manifest in {directory} is of {manifest.version.name}."
        )
    return manifest
