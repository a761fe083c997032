"""What one node of the trial job has seen; written there, judged on the login node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class NodeReport:
    rank: int
    host: str
    """As Slurm calls it."""
    other: str = ""
    """The other node's, likewise; empty where the trial has one node only."""
    steps: list[str] = field(default_factory=list)
    """What was done to its end, in order."""
    failed: dict[str, str] = field(default_factory=dict)
    """What was not: step to reason."""
    versions: dict[str, str] = field(default_factory=dict)
    """Python and packages; '' for one that is not installed."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables about proxies and offline work."""
    addresses: list[str] = field(default_factory=list)
    interface_addresses: list[str] = field(default_factory=list)
    free_ports: int | None = None
    """Of network.port_range; None where it is not set."""
    reached: dict[str, str] = field(default_factory=dict)
    """Address of the other node to '' or why it was not reached."""
    resolved: str = ""
    """Why the other's host name does not resolve; '' if it does."""
    skew_s: float | None = None
    """How far the other's clock is ahead of ours."""
    fsync_s: list[float] = field(default_factory=list)
    seen_s: list[float] = field(default_factory=list)
    """How long until a file that one node replaced was new on the other one and back, halved."""
    links_won: list[int] = field(default_factory=list)
    links_tried: int = 0
    gpus: list[str] = field(default_factory=list)
    """A line of nvidia-smi for each GPU."""
    collective: dict[str, Any] = field(default_factory=dict)
    """backend, seconds, gib_s of an all-reduce across the nodes, or error."""
    has_internet: bool = False
