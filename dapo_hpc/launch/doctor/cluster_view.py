"""What Slurm says about a cluster, read from the output of its commands."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Run = Callable[[Sequence[str]], str]
"""Runs one of Slurm's commands and returns what it prints; raises what launch.slurm.run raises."""

NODE_FORMAT = "%N|%R|%c|%m|%G|%t|%f"
UNUSABLE = ("down", "drain", "drng", "fail", "maint", "unk", "boot", "inval")


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    name: str
    fields: Mapping[str, str]
    """As `scontrol show partition` prints them: MaxTime, GraceTime, PreemptMode, ..."""

    def __getitem__(self, key: str) -> str:
        return self.fields.get(key, "")

    @property
    def num_nodes(self) -> int:
        return int(self["TotalNodes"] or 0)

    def allows(self, key: str, value: str) -> bool:
        """Whether an Allow... list of the partition has a value."""
        listed = self[key] or "ALL"
        return listed in ("ALL", "N/A", "(null)") or value in listed.split(",")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    name: str
    partition: str
    cpus: int
    memory_mib: int
    gpus: Mapping[str, int]
    """GPU type to number; '' for a type without name."""
    state: str
    features: frozenset[str]

    @property
    def is_usable(self) -> bool:
        return not self.state.startswith(UNUSABLE) and not self.state.endswith("*")

    def num_gpus(self, gpu_type: str | None) -> int:
        return self.gpus.get(gpu_type, 0) if gpu_type else sum(self.gpus.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    partitions: Mapping[str, Partition]
    nodes: Sequence[Node]
    """A node of two partitions is there twice."""
    config: Mapping[str, str] = field(default_factory=dict)
    """As `scontrol show config` prints it."""

    def default_partition(self) -> str | None:
        names = [name for name, found in self.partitions.items() if found["Default"] == "YES"]
        return names[0] if names else None

    def nodes_of(self, partition: str) -> list[Node]:
        return [node for node in self.nodes if node.partition == partition]


def look(run: Run) -> ClusterView:
    """Ask Slurm three questions."""
    return ClusterView(
        partitions=_partitions(run(["scontrol", "--oneliner", "show", "partition"])),
        nodes=_nodes(run(["sinfo", "--noheader", "--Node", f"--format={NODE_FORMAT}"])),
        config=_config(run(["scontrol", "show", "config"])),
    )


def _partitions(text: str) -> dict[str, Partition]:
    found = {}
    for line in text.splitlines():
        fields = dict(word.partition("=")[::2] for word in line.split())
        if name := fields.get("PartitionName"):
            found[name] = Partition(name=name, fields=fields)
    return found


def _nodes(text: str) -> list[Node]:
    found = []
    for line in text.splitlines():
        name, partition, cpus, memory, gres, state, features = line.strip().split("|")
        node = Node(
            name=name,
            partition=partition,
            cpus=int(cpus.rstrip("+")),
            memory_mib=int(memory.rstrip("+")),
            gpus=_gpus(gres),
            state=state,
            features=frozenset(features.split(",")) - {"(null)"},
        )
        found.append(node)
    return found


def _gpus(gres: str) -> dict[str, int]:
    """'gpu:h100:8(S:0-1),nvme:1' is {'h100': 8}; 'gpu:8' is {'': 8}."""
    found: dict[str, int] = {}
    for kind, number in re.findall(r"(?:^|,)gpu(?::([A-Za-z][\w.-]*))?:(\d+)", gres):
        found[kind] = found.get(kind, 0) + int(number)
    return found


def _config(text: str) -> dict[str, str]:
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}
