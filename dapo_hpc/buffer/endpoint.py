"""Where the buffer listens now: `endpoint.json`, replaced atomically by each incarnation."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass

from dapo_hpc.network import local_addresses
from dapo_hpc.run_dir import RunDir, write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    host: str
    """Name of the buffer's node."""
    addresses: list[str]
    """IPv4, of all its network interfaces."""
    port: int
    incarnation: int
    pid: int

    def urls(self) -> list[str]:
        """In the order to try: the loopback first on the same node, never on another."""
        is_here = self.host == socket.gethostname()
        addresses = ["127.0.0.1", *self.addresses] if is_here else self.addresses
        return [f"https://{address}:{self.port}" for address in addresses]


def publish_endpoint(
    run: RunDir, port: int, incarnation: int, interface: str | None = None
) -> None:
    """Say where this process listens: at every address, or at that of one interface."""
    endpoint = Endpoint(
        host=socket.gethostname(),
        addresses=local_addresses(interface),
        port=port,
        incarnation=incarnation,
        pid=os.getpid(),
    )
    write_json(run.endpoint, asdict(endpoint))


def read_endpoint(run: RunDir) -> Endpoint:
    """Raises FileNotFoundError until a buffer has started."""
    return Endpoint(**json.loads(run.endpoint.read_text()))
