"""The daemons of a cluster that belong to no node: munged, MariaDB, slurmdbd, slurmctld."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Sequence

from slurm.mini.processes import daemon, start, wait_for
from slurm.mini.shape import MiniRefused, Place, Record, user_name

SBIN = "/usr/sbin:/sbin"
FIRST_PORT, LAST_PORT = 23000, 31999
"""Below the ports that the kernel gives to outgoing connections (32768 and up)."""


def program(name: str) -> str:
    """Path of a program that the cluster needs."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SBIN}")
    if found is None:
        raise MiniRefused(
            f"{name} is not installed. `make slurm-install` installs what a mini cluster needs "
            "(Debian or Ubuntu, as root)."
        )
    return found


def client(place: Place, *words: str, within_s: float = 20.0) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands against this cluster."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return subprocess.run(
        [program(words[0]), *words[1:]],
        env=kept | {"SLURM_CONF": str(place.conf)},
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def free_ports(names: Sequence[str]) -> dict[str, int]:
    """One port for each name, free on every address of this host at this moment."""
    taken: dict[str, int] = {}
    sockets = []
    try:
        while len(taken) < len(names):
            number = FIRST_PORT + secrets.randbelow(LAST_PORT - FIRST_PORT + 1)
            probe = socket.socket()
            sockets.append(probe)
            try:
                probe.bind(("", number))
            except OSError:
                continue
            taken[names[len(taken)]] = number
    finally:
        for probe in sockets:
            probe.close()
    return taken


def start_munged(place: Place) -> None:
    folder = place.munge_socket.parent
    key = folder / "munge.key"
    with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(128))
    # --force: munged would refuse a socket below /tmp, which others can write to.
    words = [program("munged"), "--foreground", "--force", f"--key-file={key}"]
    words += [f"--socket={place.munge_socket}", f"--pid-file={place.root}/run/munged.pid"]
    words += [f"--log-file={place.log}/munged.log", f"--seed-file={folder}/seed"]
    munged = start(place, "munged", words)
    check = [program("munge"), "-S", str(place.munge_socket), "-n"]
    wait_for(
        f"munged does not answer at {place.munge_socket}.",
        lambda: subprocess.run(check, capture_output=True, check=False).returncode == 0,
        within_s=10,
        needs=munged,
    )


def start_database(place: Place, record: Record, password: str) -> None:
    """MariaDB with an empty data directory, then slurmdbd, then the cluster's row in it."""
    root = place.root
    install = [program("mariadb-install-db"), "--no-defaults", f"--datadir={root}/mysql"]
    install += [f"--user={user_name()}", "--auth-root-authentication-method=socket"]
    done = subprocess.run([*install, "--skip-test-db"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MiniRefused(f"mariadb-install-db failed: {(done.stderr or done.stdout)[-500:]}")
    words = [program("mariadbd"), "--no-defaults", f"--user={user_name()}"]
    words += [f"--datadir={root}/mysql", f"--socket={root}/run/mysql.sock"]
    words += [f"--pid-file={root}/run/mariadbd.pid", "--bind-address=127.0.0.1"]
    words += [f"--port={record.ports['mariadbd']}", "--innodb-buffer-pool-size=32M"]
    words += ["--innodb-log-file-size=8M", "--innodb-flush-log-at-trx-commit=0"]
    words += ["--innodb-lock-wait-timeout=900", "--skip-log-bin", "--performance-schema=OFF"]
    mariadbd = start(place, "mariadbd", words)
    _make_slurm_user(place, password, mariadbd)
    slurmdbd = start(place, "slurmdbd", [program("slurmdbd"), "-D"])
    wait_for(
        "slurmdbd does not answer.",
        lambda: client(place, "sacctmgr", "-n", "list", "cluster").returncode == 0,
        within_s=60,
        needs=slurmdbd,
    )
    # Without its row slurmctld ends with "we have no TRES from it".
    client(place, "sacctmgr", "-i", "add", "cluster", place.cluster_name)


def _make_slurm_user(place: Place, password: str, mariadbd: int) -> None:
    command = [program("mariadb"), "--no-defaults", f"--socket={place.root}/run/mysql.sock"]
    statements = "create database slurm_acct_db;"
    for host in ("localhost", "127.0.0.1"):
        statements += f"create user slurm@'{host}' identified by '{password}';"
        statements += f"grant all on slurm_acct_db.* to slurm@'{host}';"
    wait_for(
        "MariaDB does not answer.",
        lambda: subprocess.run([*command, "-e", "select 1"], capture_output=True).returncode == 0,
        within_s=60,
        needs=mariadbd,
    )
    # By standard input: a command line is there for everybody to read.
    subprocess.run(command, input=statements, text=True, check=True, capture_output=True)


def start_controller(place: Place) -> None:
    """Start slurmctld with whatever state is there, and wait until it answers."""
    controller = daemon(place, "slurmctld")
    if controller is None:
        words = [program("slurmctld"), "-D", "-i", "-f", str(place.conf)]
        controller = start(place, "slurmctld", words)
    wait_for(
        "slurmctld does not answer.",
        lambda: "is UP" in client(place, "scontrol", "ping").stdout,
        within_s=30,
        needs=controller,
    )
