"""Where compilers and engines keep what they have compiled: code that later processes run."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "VLLM_CACHE_ROOT": "vllm",
    "XDG_CACHE_HOME": "xdg",
}
"""Variable to directory below the site's storage.node_cache."""


def require_own_caches(environment: Mapping[str, str]) -> None:
    """Make the caches that the environment names, for this user alone.

    On a node's own disk their names can be guessed, and whoever makes them first could leave
    something to run.

    Raises:
        ValueError: one of them, or the directory it lies in, is another user's, or others may write
            to it.
    """
    for name in CACHES:
        if name in environment:
            cache = Path(environment[name])
            cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            cache.mkdir(mode=0o700, exist_ok=True)
            for directory in (cache.parent, cache):
                _require_own(name, directory)


def _require_own(name: str, directory: Path) -> None:
    found = directory.stat()
    is_sticky = bool(found.st_mode & stat.S_ISVTX)
    if found.st_uid not in (0, os.getuid()):
        problem = f"belongs to user {found.st_uid}, and this is user {os.getuid()}"
    elif found.st_mode & stat.S_IWOTH and not is_sticky:
        problem = f"can be written by everybody (mode {stat.S_IMODE(found.st_mode):o})"
    else:
        return
    raise ValueError(
        f"{name}: {directory} {problem}. What others put there would be run. Remove it, or set "
        "storage.node_cache in the site file to a directory of your own."
    )
