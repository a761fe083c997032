"""Up, down, and what can happen to a cluster in between."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from slurm.mini import conf, shape
from slurm.mini.daemons import (
    client,
    free_ports,
    program,
    start_controller,
    start_database,
    start_munged,
)
from slurm.mini.nodes import RootNodes, UserNodes, check_rights, free_subnet, remove_network
from slurm.mini.processes import daemon, is_stamped_alive, kill, processes, wait_for
from slurm.mini.shape import MiniRefused, Place, Record, Shape

FOLDERS = ("state", "log", "spool", "run", "dev", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "scontrol", "sinfo", "srun", "sbatch")
ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb", "sacctmgr")


def up(place: Place, wanted: Shape, owner: str | None = None) -> None:
    """Start a cluster and wait until its nodes are idle; does nothing if it runs already.

    What a dead cluster of this name left behind is removed first, and what clusters of any name
    left whose owners are gone.

    Raises:
        MiniRefused: other switches than the running cluster's; something is not installed or not
            allowed; a daemon does not start. Nothing is left behind.
    """
    shape.check(wanted)
    for name in (*PROGRAMS, *(ACCOUNTING_PROGRAMS if wanted.accounting else ())):
        program(name)
    shape.own_parent()
    sweep(place)
    if _is_whole(place):
        record = shape.read_record(place)
        if record is not None and record.shape != wanted:
            raise MiniRefused(
                f"mini cluster {place.name} runs with other switches ({record.shape}). Take it "
                f"down first, or start another one with --name."
            )
        return
    down(place)
    if wanted.form == "root":
        check_rights(place)
    try:
        _start(place, wanted, owner)
    except BaseException as problem:
        said = _last_words(place)
        down(place)
        if isinstance(problem, MiniRefused) and said:
            raise MiniRefused(f"{problem}\n{said}") from None
        raise


def _start(place: Place, wanted: Shape, owner: str | None) -> None:
    for folder in FOLDERS:
        (place.root / folder).mkdir(parents=True)
    # Other users may run jobs in the root form: they must reach the socket, and only that.
    place.munge_socket.parent.chmod(0o711 if wanted.form == "root" else 0o700)
    own_ports = wanted.node_names() if wanted.form == "user" else []
    names = ["slurmctld", *(["slurmdbd", "mariadbd"] if wanted.accounting else []), *own_ports]
    record = Record(
        shape=wanted,
        ports=free_ports(names),
        subnet=free_subnet(place) if wanted.form == "root" else None,
        owner=owner,
    )
    record.write(place)
    password = secrets.token_hex(16)
    conf.write_all(place, record, password)
    nodes = nodes_of(place, record)
    nodes.prepare()
    start_munged(place)
    if wanted.accounting:
        start_database(place, record, password)
    start_controller(place)
    for name in wanted.node_names():
        nodes.boot(name)
    wait_for("not every node became idle.", lambda: is_ready(place, wanted.nodes), within_s=60)


def down(place: Place) -> None:
    """Kill and remove everything of a cluster, whatever is left of it; nothing is not an error."""
    # slurmctld first: it would restart what it sees dying.
    if (controller := daemon(place, "slurmctld")) is not None:
        kill([controller])
    while left := [found.pid for found in processes(place)]:
        kill(left)
    remove_network(place)
    if place.root.exists():
        shutil.rmtree(place.root)
        with suppress(OSError):  # the last one closes the door
            place.root.parent.rmdir()


def sweep(keep: Place) -> list[str]:
    """Take down the clusters whose owner process is gone; their names."""
    gone = []
    for folder in sorted(shape.parent().iterdir()) if shape.parent().exists() else []:
        found = Place(name=folder.name)
        record = shape.read_record(found)
        if found != keep and record and record.owner and not is_stamped_alive(record.owner):
            down(found)
            gone.append(found.name)
    return gone


def is_ready(place: Place, num_nodes: int) -> bool:
    words = ("sinfo", "--noheader", "--partition=learner", "--Node", "--format=%t")
    states = client(place, *words).stdout.split()
    return len(states) == num_nodes and set(states) <= {"idle", "mix", "alloc"}


def running(place: Place) -> Record:
    """The record of a cluster that exists.

    Raises:
        MiniRefused: there is none.
    """
    record = shape.read_record(place)
    if record is None:
        raise MiniRefused(f"there is no mini cluster {place.name}. Start it with `make slurm-up`.")
    return record


def nodes_of(place: Place, record: Record) -> UserNodes:
    return (RootNodes if record.shape.form == "root" else UserNodes)(place, record)


def node_event(place: Place, verb: str, node: str) -> None:
    """crash, revive, cut, mend, killd or startd of one node."""
    record = running(place)
    if node not in record.shape.node_names():
        names = record.shape.node_names()
        raise MiniRefused(f"there is no node {node!r}; expected {names[0]} to {names[-1]}.")
    nodes = nodes_of(place, record)
    if verb == "crash":
        nodes.crash(node)
    elif verb == "revive":
        _revive(place, nodes, node)
    elif verb in ("cut", "mend"):
        nodes.set_link(node, up=verb == "mend")
    elif verb == "killd":
        kill([_slurmd(place, node)])
    elif daemon(place, f"slurmd-{node}") is None:
        nodes.start_slurmd(node)


def _slurmd(place: Place, node: str) -> int:
    found = daemon(place, f"slurmd-{node}")
    if found is None:
        raise MiniRefused(f"slurmd of {node} does not run.")
    return found


def _revive(place: Place, nodes: UserNodes, node: str) -> None:
    """Boot a node, and take it back into service where Slurm has set it down."""
    # Slurm counts seconds: a boot in the second of the node's last answer would go unnoticed.
    time.sleep(1.1)
    began = datetime.now().replace(microsecond=0)
    nodes.boot(node)
    wait_for(f"{node} does not come back.", lambda: _is_back(place, node, began), within_s=60)


def _is_back(place: Place, node: str, began: datetime) -> bool:
    """Whether the slurmd started since `began` has reported and the node can be used."""
    shown = client(place, "scontrol", "--oneliner", "show", "node", node).stdout
    fields = dict(word.partition("=")[::2] for word in shown.split())
    started = fields.get("SlurmdStartTime", "")
    if not started.startswith("2") or datetime.fromisoformat(started) < began:
        return False
    if "NOT_RESPONDING" in fields["State"]:
        return False
    if fields["State"].startswith("DOWN"):
        # Slurm saw an unexpected reboot and waits for an administrator's word.
        client(place, "scontrol", "update", f"nodename={node}", "state=resume")
        return False
    return True


def kill_controller(place: Place) -> None:
    running(place)
    if (controller := daemon(place, "slurmctld")) is None:
        raise MiniRefused("slurmctld does not run.")
    kill([controller])


def revive_controller(place: Place) -> None:
    running(place)
    start_controller(place)


def _is_whole(place: Place) -> bool:
    """Whether every daemon of a cluster with a record lives."""
    record = shape.read_record(place)
    if record is None:
        return False
    wanted = ["munged", "slurmctld", *(["slurmdbd", "mariadbd"] if record.shape.accounting else [])]
    wanted += [f"slurmd-{node}" for node in record.shape.node_names()]
    alive = {found.daemon for found in processes(place)}
    return set(wanted) <= alive and is_ready(place, record.shape.nodes)


def _last_words(place: Place) -> str:
    """What daemons that ended said, for a cluster that did not start and is about to be removed."""
    lines = []
    for file in sorted(place.log.glob("*.out")) if place.log.exists() else []:
        said = _tail(file)
        fatal = [line for line in said if "fatal" in line.lower() or "emergency" in line.lower()]
        lines += [f"  {file.stem}: {line}" for line in fatal[-2:] or said[-1:]]
    return "\n".join(lines)


def _tail(file: Path) -> list[str]:
    with file.open("rb") as opened:
        opened.seek(max(0, os.fstat(opened.fileno()).st_size - 4000))
        return opened.read().decode(errors="replace").splitlines()
