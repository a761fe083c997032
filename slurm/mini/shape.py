"""What a mini cluster is: the switches somebody chose, and where its files and names are."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import pwd
import re
import socket
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Form = Literal["user", "root"]

MAX_NODES = 64
NODE_PREFIX = "mn"


class MiniRefused(Exception):
    """Something of the machine or of the request does not allow it; the text is for the user."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The switches of a cluster."""

    form: Form
    nodes: int
    cpus: int
    """Of each node, as Slurm believes; jobs share the machine's real ones."""
    memory_mib: int
    gpus: int
    """Of each node; fake ones: Slurm gives them out, nothing can compute on them."""
    gpu_type: str
    grace_s: int
    """GraceTime of the preemptible partition."""
    preempt_mode: Literal["REQUEUE", "CANCEL"]
    user_signal: bool
    """Whether preemption sends the job's own --signal at once (preempt_send_user_signal)."""
    accounting: bool

    def node_names(self) -> list[str]:
        return [f"{NODE_PREFIX}{number}" for number in range(1, self.nodes + 1)]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the files of a cluster are, and the names it takes on the machine."""

    name: str

    @property
    def root(self) -> Path:
        return parent() / self.name

    @property
    def conf(self) -> Path:
        return self.root / "slurm.conf"

    @property
    def record(self) -> Path:
        return self.root / "cluster.json"

    @property
    def munge_socket(self) -> Path:
        return self.root / "munge" / "munge.sock"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def cluster_name(self) -> str:
        """Slurm's ClusterName; every process of a job has it as SLURM_CLUSTER_NAME."""
        return f"mini_{self.tag}"

    @property
    def tag(self) -> str:
        """Eight hex digits; network interfaces have room for 15 characters."""
        return hashlib.sha256(str(self.root).encode()).hexdigest()[:8]

    @property
    def bridge(self) -> str:
        return f"ms{self.tag}"

    def link(self, node: str) -> str:
        return f"{self.bridge}{node.removeprefix(NODE_PREFIX)}n"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What `cluster.json` holds while a cluster exists."""

    shape: Shape
    ports: dict[str, int]
    """slurmctld, slurmdbd, mariadbd, and in the user form one for each node."""
    subnet: str | None
    """First three numbers of the nodes' addresses in the root form, such as 10.77.0."""
    owner: str | None
    """Process that wanted it, as `PID:START`; once it is gone, any `up` or `down` cleans up."""

    def write(self, place: Place) -> None:
        beside = place.record.with_suffix(".new")
        beside.write_text(json.dumps(asdict(self), indent=1))
        os.replace(beside, place.record)


def read_record(place: Place) -> Record | None:
    """None where there is no cluster, or where one was killed before it had a record."""
    try:
        fields: dict[str, Any] = json.loads(place.record.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    shape = Shape(**fields.pop("shape"))
    return Record(shape=shape, **fields)


def place(name: str) -> Place:
    """Checked: the name goes into paths and must leave room for the sockets below."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,23}", name):
        raise MiniRefused(
            f"{name!r} is no name for a mini cluster; expected up to 24 lower-case letters, digits "
            "and hyphens."
        )
    return Place(name=name)


def parent() -> Path:
    """Directory of this user's mini clusters. Short, since unix sockets allow 107 characters."""
    return Path(f"/tmp/dapo-mini-slurm-{os.getuid()}")


def own_parent() -> Path:
    """The same, made if absent, and refused if somebody else could change what is in it."""
    path = parent()
    path.mkdir(mode=0o755, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise MiniRefused(
            f"{path} is not a directory that only {user_name()} can write to; a mini cluster keeps "
            "its keys there. Look who made it and remove it."
        )
    return path


def user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return getpass.getuser()


def host_name() -> str:
    return socket.gethostname().partition(".")[0]


def check(shape: Shape) -> None:
    """Refuse switches that Slurm would refuse less clearly."""
    limits = {
        "nodes": (shape.nodes, 1, MAX_NODES),
        "cpus": (shape.cpus, 1, 1024),
        "memory-mib": (shape.memory_mib, 100, 100_000_000),
        "gpus": (shape.gpus, 0, 64),
        "grace": (shape.grace_s, 0, 3600),
    }
    for switch, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise MiniRefused(f"--{switch} {value}: expected {low} to {high}.")
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", shape.gpu_type):
        raise MiniRefused(f"--gpu-type {shape.gpu_type!r}: expected a word, such as h100.")
