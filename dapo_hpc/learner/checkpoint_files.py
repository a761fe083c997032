"""The directories of checkpoints on disk: their names, their digests, and how they disappear.

    step_000010/               a checkpoint
    .tmp-step_000012-5f3a/     being written, or left by a kill; a new name each time
    LATEST                     names the newest checkpoint

Renaming is the last thing done to a new checkpoint and the first to one that is deleted, so what
has a checkpoint's name was durable once, file by file, and is all there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

LATEST = "LATEST"
FILES = "files.json"
"""Name -> [bytes, sha256] of every other file of a checkpoint."""
TEMPORARY = ".tmp-"
STEP = re.compile(r"step_(\d{6,})")

Digest = list[int | str]
"""Bytes and sha256."""


def directory_of(root: Path, step: int) -> Path:
    return root / f"step_{step:06d}"


def steps_in(root: Path) -> list[int]:
    """Steps that have a checkpoint, oldest first."""
    found = [STEP.fullmatch(path.name) for path in root.glob("step_*")]
    return sorted(int(match[1]) for match in found if match)


def discard(path: Path) -> None:
    """Delete a checkpoint; killed meanwhile, it leaves nothing under a checkpoint's name."""
    if path.exists():
        doomed = path.with_name(f"{TEMPORARY}{path.name}-{os.urandom(4).hex()}")
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def make_temporary(root: Path, step: int) -> Path:
    """An empty directory to write a checkpoint in, of a name that nobody else uses."""
    path = root / f"{TEMPORARY}{directory_of(root, step).name}-{os.urandom(4).hex()}"
    path.mkdir()
    return path


def remove_temporary(root: Path) -> None:
    """Delete what killed processes left."""
    for left in root.glob(f"{TEMPORARY}*"):
        shutil.rmtree(left)


def damage(path: Path, rank: int, world: int) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files; None if nothing is."""
    try:
        expected: dict[str, Digest] = json.loads((path / FILES).read_text())
    except (OSError, ValueError) as error:
        return f"{FILES}: {type(error).__name__}: {error}"
    for name in sorted(expected)[rank::world]:
        try:
            found = digest_of(path / name)
        except OSError as error:
            return f"{name}: {type(error).__name__}: {error}"
        if found != expected[name]:
            return f"{name} {_difference(found, expected[name])}"
    return None


def digest_of(path: Path) -> Digest:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return [path.stat().st_size, digest]


def _difference(found: Digest, expected: Digest) -> str:
    if found[0] != expected[0]:
        return f"has {found[0]} bytes instead of {expected[0]}"
    return "does not match its digest"


def settle(path: Path) -> Digest:
    """Make a file durable; its digest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return digest_of(path)
