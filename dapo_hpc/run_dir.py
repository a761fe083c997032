"""The run directory: every path of a run, named once.

runs/<name>/ config.toml env.json endpoint.json auth/ jobs/ prompts/ buffer/ weights/ checkpoints/
             logs/ metrics.jsonl eval/ report/ model/
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of one run. Holds no state; every process of the run builds its own."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved config, written before anything starts."""
        return self.root / "config.toml"

    @property
    def env(self) -> Path:
        """Versions, commit and allow-listed environment of the launch."""
        return self.root / "env.json"

    @property
    def lock(self) -> Path:
        """Held (flock) by the local launcher while it lives."""
        return self.root / "launcher.lock"

    @property
    def endpoint(self) -> Path:
        """Where the buffer listens now."""
        return self.root / "endpoint.json"

    @property
    def auth(self) -> Path:
        """Run certificate, key and token; 0700."""
        return self.root / "auth"

    @property
    def jobs(self) -> Path:
        """What the scheduler runs; 0700, because it may hold pickles."""
        return self.root / "jobs"

    @property
    def train_prompts(self) -> Path:
        """Prepared training prompts: tokenized, filtered, without duplicates."""
        return self.root / "prompts" / "train.parquet"

    @property
    def eval_prompts(self) -> Path:
        return self.root / "prompts" / "eval.parquet"

    @property
    def buffer(self) -> Path:
        """Owners, ledgers and segments of the buffer."""
        return self.root / "buffer"

    @property
    def status(self) -> Path:
        """The buffer's last snapshot, readable when every process is dead."""
        return self.root / "buffer" / "status.json"

    @property
    def disk_full(self) -> Path:
        """Exists, empty, while the buffer waits for space on the disk."""
        return self.root / "buffer" / "DISK_FULL"

    @property
    def weights(self) -> Path:
        """One directory for each published policy version."""
        return self.root / "weights"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def eval(self) -> Path:
        """One JSON file for each finished evaluation."""
        return self.root / "eval"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def model(self) -> Path:
        """The trained model in Hugging Face format; appears when the run is complete."""
        return self.root / "model"


def deny_others_writing() -> None:
    """From here on this process, and those it starts, make no file that group or others may write.

    Many clusters give each user a umask that lets the group write.
    """
    os.umask(os.umask(0o022) | 0o022)


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically and durably: a reader sees the old text or the new one, whole."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_bytes(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """As write_text. The temporary file lies beside the target, so that the rename is atomic."""
    # Not the process id: that of a container's first process is the same on every node.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make renames and new names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
