"""The nodes of a cluster: plain slurmd processes, or namespaces with a slurmd inside."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from slurm.mini.conf import node_address
from slurm.mini.daemons import program
from slurm.mini.processes import children, daemon, kill, processes, start, wait_for
from slurm.mini.shape import MiniRefused, Place, Record

INIT = Path(__file__).with_name("node_init.sh")


class UserNodes:
    """Several slurmd on one host, each with a port of its own."""

    def __init__(self, place: Place, record: Record) -> None:
        self.place = place
        self.record = record

    def prepare(self) -> None:
        """Nothing is shared by the nodes."""

    def boot(self, node: str) -> None:
        if daemon(self.place, f"slurmd-{node}") is None:
            (self.place.root / "spool" / node).mkdir(exist_ok=True)
            self.start_slurmd(node, "-b")

    def start_slurmd(self, node: str, *options: str) -> None:
        words = [program("slurmd"), "-D", "-N", node, "-f", str(self.place.conf), *options]
        start(self.place, f"slurmd-{node}", words)

    def crash(self, node: str) -> None:
        """SIGKILL to slurmd first, so that it cannot report what becomes of the rest."""
        if (slurmd := daemon(self.place, f"slurmd-{node}")) is not None:
            kill([slurmd])
        while left := [found.pid for found in processes(self.place) if found.node == node]:
            kill(left)

    def set_link(self, node: str, *, up: bool) -> None:
        raise MiniRefused(
            f"{node} has no network of its own to {'mend' if up else 'cut'}: all nodes of the user "
            "form share the host's. Use a cluster of the root form (`make slurm-up FORM=root`)."
        )

    def inside(self, node: str) -> list[str]:
        """Words in front of a command that is to run on the node."""
        del node
        return []


class RootNodes(UserNodes):
    """Each node has its own network, host name, processes, /proc, /etc/hosts and /dev/shm."""

    def prepare(self) -> None:
        """A bridge that is the network between the nodes and the host."""
        bridge, subnet = self.place.bridge, self.record.subnet
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{subnet}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")

    def boot(self, node: str) -> None:
        if daemon(self.place, f"unshare-{node}") is not None:
            return
        (self.place.root / "spool" / node).mkdir(exist_ok=True)
        words = [program("unshare"), "--mount", "--uts", "--net", "--pid", "--fork"]
        words += ["--kill-child", "--mount-proc", "bash", str(INIT), node, str(self.place.root)]
        start(self.place, f"unshare-{node}", [*words, node_address(self.record, node)])
        wait_for(f"{node} does not boot.", lambda: bool(self._init(node)), within_s=10)
        self._plug_in(node)

    def _plug_in(self, node: str) -> None:
        """A cable from the bridge to the node's eth0. It ceases to exist with the node."""
        link = self.place.link(node)
        # The kernel may still be taking the cable of the node's former life away.
        _remove_link(link)
        target = ("netns", str(self._init(node)[0]))
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", *target)
        _ip("link", "set", link, "master", self.place.bridge, "up")

    def start_slurmd(self, node: str, *options: str) -> None:
        words = [*self.inside(node), program("slurmd"), "-D", "-N", node, *options]
        start(self.place, f"slurmd-{node}", words)

    def crash(self, node: str) -> None:
        """Power loss: nothing leaves the node any more, then everything on it is gone at once."""
        if init := self._init(node):
            self.set_link(node, up=False)
            kill(init)
        super().crash(node)

    def set_link(self, node: str, *, up: bool) -> None:
        _ip("link", "set", self.place.link(node), "up" if up else "down")

    def inside(self, node: str) -> list[str]:
        init = self._init(node)
        if not init:
            raise MiniRefused(f"{node} is off. Boot it with `revive {node}`.")
        return [program("nsenter"), "-t", str(init[0]), "-a"]

    def _init(self, node: str) -> list[int]:
        """The node's first process, seen from the host; killing it ends all others on the node."""
        outer = daemon(self.place, f"unshare-{node}")
        return [] if outer is None else children(outer)


def remove_network(place: Place) -> None:
    """Links and bridge of a cluster, found by their names; the rest went with the processes."""
    for folder in sorted(Path("/sys/class/net").glob(f"{place.bridge}*"), reverse=True):
        _remove_link(folder.name)


def _remove_link(name: str) -> None:
    folder = Path("/sys/class/net", name)
    if folder.exists():
        # Fails where the kernel is just taking it away by itself.
        subprocess.run([program("ip"), "link", "del", name], capture_output=True, check=False)
    wait_for(f"network interface {name} stays.", lambda: not folder.exists(), within_s=10)


def check_rights(place: Place) -> None:
    """Refuse the root form where it cannot work.

    Raises:
        MiniRefused: not root, or the kernel allows no bridge, veth or namespace.
    """
    if os.geteuid():
        raise MiniRefused(
            "the root form needs root: a node is made of namespaces and a network interface. Run "
            "it as root, or take the user form (`make slurm-up FORM=user`)."
        )
    trials = {
        "a bridge": ["ip", "link", "add", place.bridge, "type", "bridge"],
        "a veth pair": ["ip", "link", "add", place.link("mn1"), "type", "veth"],
        "new namespaces": ["unshare", "--mount", "--uts", "--pid", "--net", "--fork", "true"],
    }
    try:
        for what, words in trials.items():
            done = subprocess.run(
                [program(words[0]), *words[1:]], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise MiniRefused(
                    f"this machine does not let root make {what} ({done.stderr.strip()}). A "
                    "container needs CAP_SYS_ADMIN and CAP_NET_ADMIN, the kernel veth and bridge. "
                    "The user form needs none of them (`make slurm-up FORM=user`)."
                )
    finally:
        remove_network(place)


def free_subnet(place: Place) -> str:
    """A network 10.77.X that no interface of this host is in."""
    # Each cluster begins its search elsewhere, for two may be starting at the same time.
    first = int(place.tag[:2], 16)
    taken = subprocess.run(
        [program("ip"), "-o", "addr"], capture_output=True, text=True, check=True
    ).stdout
    for number in ((first + step) % 256 for step in range(256)):
        if f" 10.77.{number}." not in taken:
            return f"10.77.{number}"
    raise MiniRefused("all networks from 10.77.0 to 10.77.255 are in use on this machine.")


def _ip(*words: str) -> None:
    done = subprocess.run([program("ip"), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MiniRefused(f"`ip {' '.join(words)}` failed: {done.stderr.strip()}.")
