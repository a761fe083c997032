"""At which addresses other nodes may find this one."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of a network interface."""


def local_addresses(interface: str | None = None) -> list[str]:
    """IPv4 addresses of this host's interfaces without the loopback, or of one of them.

    Raises ValueError when the interface is not there or has no address.
    """
    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                found[name] = socket.inet_ntoa(reply[20:24])
    if interface is None:
        return [address for address in found.values() if not address.startswith("127.")]
    if interface not in found:
        raise ValueError(
            f"{socket.gethostname()} has no network interface {interface!r} with an IPv4 address; "
            f"it has {', '.join(sorted(found))}. Set network.interface in the site file to one "
            "that every node has."
        )
    return [found[interface]]
