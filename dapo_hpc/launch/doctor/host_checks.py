"""Checks of one host, on the login node and on compute nodes: directories, network, environment."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from dapo_hpc.launch.doctor.findings import Finding, note, ok, problem

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy")
MIN_FREE_GIB = 50.0
"""A checkpoint of a 7B model with its optimizer is 90 GiB; below this not even a small run fits."""
MIN_FREE_FILES = 10_000


def _may_write(directory: Path) -> bool:
    return os.access(directory, os.W_OK | os.X_OK)


def check_runs_directory(
    runs: Path,
    space: Callable[[Path], os.statvfs_result] = os.statvfs,
    may_write: Callable[[Path], bool] = _may_write,
) -> list[Finding]:
    """Whether run directories can be made there and nobody else could change them."""
    check = "runs directory"
    found = _nearest(runs)
    if not found.is_dir():
        return [problem(check, f"{found} is not a directory.", "set storage.runs to another path.")]
    if not may_write(found):
        return [
            problem(
                check,
                f"{found} is not writable for you, so {runs} cannot be used.",
                "set storage.runs to a directory of yours on the shared file system.",
            )
        ]
    mode = found.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        return [
            problem(
                check,
                f"everybody may write to {found} (mode {stat.S_IMODE(mode):o}): others could "
                "replace your runs, and with them your jobs' scripts.",
                f"chmod o-w {found}, or set storage.runs to another directory.",
            )
        ]
    where = f"{runs}" if found == runs else f"{runs} (to be made in {found})"
    first = ok(check, f"{where} is writable for you.")
    if mode & stat.S_IWGRP:
        first = note(
            check,
            f"{where} is writable for its group too; a member could replace your runs.",
            f"chmod g-w {found}, unless you trust all of the group.",
        )
    return [first, check_space(found, space(found))]


def check_space(path: Path, found: os.statvfs_result) -> Finding:
    """Room for bytes and for files."""
    check = "runs space"
    free_gib = found.f_bavail * found.f_frsize / 2**30
    # Some parallel file systems count no files.
    free_files = found.f_favail if found.f_files else None
    text = f"{free_gib:.0f} GiB free at {path}"
    text += "" if free_files is None else f", room for {free_files} files"
    if free_files is not None and free_files < MIN_FREE_FILES:
        return problem(
            check, f"{text}.", "remove files or ask for a larger quota; a run makes thousands."
        )
    if free_gib < MIN_FREE_GIB:
        return note(
            check,
            f"{text}. A quota may leave less.",
            "`dapo check CONFIG` says what a run takes; set storage.runs to a larger file system.",
        )
    return ok(check, f"{text}. A quota may leave less.")


def check_proxies(environment: Mapping[str, str], passed: tuple[str, ...]) -> Finding:
    """Proxies do not reach between nodes; ours do not use them."""
    found = sorted(name for name in environment if name.lower() in PROXIES)
    if not found:
        return ok("proxies", "no proxy in the environment.")
    given = sorted(set(found) & set(passed))
    text = f"{', '.join(found)} set here. Actors and learner reach the buffer without proxy"
    if given:
        return note(
            "proxies",
            f"{text}; environment.passed gives {', '.join(given)} to the jobs.",
            "leave them out of environment.passed, unless something else in the jobs needs them.",
        )
    return ok("proxies", f"{text}, and jobs do not get these variables.")


def check_interface_here(interface: str | None, names: Callable[[], list[str]]) -> Finding:
    """On the login node: whether it has the interface; compute nodes are asked in the trial."""
    if interface is None:
        return ok("interface", "network.interface is not set: every address of a node is tried.")
    here = names()
    if interface in here:
        return ok("interface", f"{interface} is here too.")
    return note(
        "interface",
        f"this host has no {interface} ({', '.join(here)}). Login nodes often lack it; compute "
        "nodes must have it.",
    )


def interface_names() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def num_free_ports(ports: tuple[int, int]) -> int:
    """How many ports from first to last nobody on this host listens on."""
    return sum(_is_free(port) for port in range(ports[0], ports[1] + 1))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _nearest(path: Path) -> Path:
    """The path, or the first directory above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
