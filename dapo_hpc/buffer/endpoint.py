"""Where the buffer listens now: `endpoint.json`, replaced atomically by each incarnation."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
from dataclasses import asdict, dataclass

from dapo_hpc.run_dir import RunDir, write_json

_SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of a network interface."""


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


def publish_endpoint(run: RunDir, port: int, incarnation: int) -> None:
    """Say where this process listens."""
    endpoint = Endpoint(
        host=socket.gethostname(),
        addresses=local_addresses(),
        port=port,
        incarnation=incarnation,
        pid=os.getpid(),
    )
    write_json(run.endpoint, asdict(endpoint))


def read_endpoint(run: RunDir) -> Endpoint:
    """Raises FileNotFoundError until a buffer has started."""
    return Endpoint(**json.loads(run.endpoint.read_text()))


def local_addresses() -> list[str]:
    """IPv4 addresses of this host's interfaces, without the loopback."""
    found: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                found.append(socket.inet_ntoa(reply[20:24]))
    return [address for address in found if not address.startswith("127.")]
