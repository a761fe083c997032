"""What the reports of the trial's nodes mean. Rules only; one function for each question."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from dapo_hpc.launch.doctor.findings import Finding, note, ok, problem
from dapo_hpc.launch.doctor.node_report import NodeReport
from dapo_hpc.launch.site import JobTable, Site

SLOW_SIGHT_S = 1.0
SLOW_FSYNC_S = 0.05
TOO_SLOW_FSYNC_S = 2.0
MAX_SKEW_S = 5.0
TOO_MUCH_SKEW_S = 60.0
FEW_PORTS = 16

Reports = Sequence[NodeReport]


def judge(reports: Reports, site: Site, table: JobTable) -> Iterator[Finding]:
    """Everything that the nodes of one trial have seen, rank 0 first."""
    yield judge_versions(reports)
    yield judge_interface(reports, site)
    if site.network.port_range:
        yield judge_ports(reports, site.network.port_range)
    if site.storage.node_cache:
        yield judge_node_cache(reports, site.storage.node_cache)
    yield judge_internet(reports)
    if table.gpus_per_node:
        yield judge_gpus(reports)
    if len(reports) < 2:
        yield note("two nodes", "the trial had one node: what nodes see of each other is unknown.")
        return
    shared = judge_shared(reports)
    yield shared
    if shared.level == "problem":
        return
    yield judge_sight(reports)
    yield judge_links(reports)
    yield judge_fsync(reports)
    yield judge_sqlite(reports)
    yield judge_reach(reports, site)
    yield judge_names(reports)
    yield judge_skew(reports)
    if table.gpus_per_node:
        yield judge_collective(reports)


def judge_versions(reports: Reports) -> Finding:
    """Python and the packages must be the same everywhere, or be absent everywhere."""
    names = dict.fromkeys(name for report in reports for name in report.versions)
    for name in names:
        found = {report.host: report.versions.get(name, "") for report in reports}
        if len(set(found.values())) > 1:
            text = ", ".join(f"{version or 'none'} on {host}" for host, version in found.items())
            return problem(
                "versions",
                f"{name} differs: {text}.",
                "let environment.lines activate an environment on the shared file system, or use "
                "one container image on all nodes (environment.prefix).",
            )
    same = reports[0].versions
    listed = ", ".join(f"{name} {version}" for name, version in same.items() if version)
    if not same.get("torch"):
        return note(
            "versions",
            f"the same on all nodes: {listed}. There is no torch, which learner and actors need.",
            "install the extra [gpu] or [cpu] in the environment that environment.lines activates, "
            "or name a container that has it in environment.prefix.",
        )
    return ok("versions", f"the same on all nodes: {listed}.")


def judge_interface(reports: Reports, site: Site) -> Finding:
    """The interface of the site file must have an address on every node."""
    name = site.network.interface
    if name is None:
        addresses = "; ".join(f"{report.host}: {_listed(report.addresses)}" for report in reports)
        return ok("interface on nodes", f"network.interface is not set; addresses: {addresses}.")
    without = [report.host for report in reports if not report.interface_addresses]
    if without:
        return problem(
            "interface on nodes",
            f'network.interface = "{name}" has no IPv4 address on {", ".join(without)}; NCCL, gloo '
            "and the buffer could not use it.",
            "set network.interface to a name that `ip -br addr` shows on compute nodes, or leave "
            "it out.",
        )
    return ok("interface on nodes", f"{name} has an address on every node.")


def judge_ports(reports: Reports, ports: tuple[int, int]) -> Finding:
    """The buffer must find a free port of the range wherever it comes to run."""
    free = {report.host: report.free_ports or 0 for report in reports}
    text = ", ".join(f"{number} on {host}" for host, number in free.items())
    text = f"free ports from {ports[0]} to {ports[1]}: {text}"
    if min(free.values()) == 0:
        return problem(
            "port range",
            f"{text}.",
            "set network.port_range to ports that nothing else uses, or leave it out.",
        )
    if min(free.values()) < FEW_PORTS:
        return note(
            "port range", f"{text}; each run on a node takes one.", "widen network.port_range."
        )
    return ok("port range", f"{text}.")


def judge_node_cache(reports: Reports, path: str) -> Finding:
    wrong = _failures(reports, "node cache")
    if wrong:
        return problem(
            "node cache",
            f'storage.node_cache = "{path}" cannot be written: {wrong}.',
            "set storage.node_cache to a directory on the node's own disk, such as /tmp/$USER.",
        )
    return ok("node cache", f"{path} is writable on every node.")


def judge_internet(reports: Reports) -> Finding:
    """Compute nodes often have no way out; a library that asks for one waits for minutes."""
    without = [report.host for report in reports if not report.has_internet]
    if not without:
        return ok("internet", "compute nodes reach huggingface.co; ours do not need it.")
    waits = [
        report.host
        for report in reports
        if not report.has_internet and report.environment.get("HF_HUB_OFFLINE") != "1"
    ]
    if waits:
        return note(
            "internet",
            f"no way to huggingface.co from {', '.join(waits)}. Our processes work offline by "
            "themselves; model.path and prompts must be directories and files.",
            'tools of your own in environment.lines may wait for it: set HF_HUB_OFFLINE = "1" in '
            "environment.variables.",
        )
    return ok("internet", "no way out, and HF_HUB_OFFLINE=1 says so to the libraries.")


def judge_gpus(reports: Reports) -> Finding:
    """Every node must show the GPU that it gave to the trial, all of one kind."""
    wrong = _failures(reports, "gpus")
    silent = [r.host for r in reports if not r.gpus and "gpus" not in r.failed]
    if wrong or silent:
        return problem(
            "gpus",
            f"no GPU answers: {wrong or ', '.join(silent)}.",
            "if `nvidia-smi` works in a job of your own there, environment.prefix may lack the "
            "container's GPU option (--nv); else report the nodes, and set `exclude` meanwhile.",
        )
    kinds = {line for report in reports for line in report.gpus}
    if len(kinds) > 1:
        return note(
            "gpus",
            f"the nodes differ: {'; '.join(sorted(kinds))}. The slowest sets the learner's pace.",
            "set `constraint` or `gpu_type` to one kind.",
        )
    return ok("gpus", f"every node: {kinds.pop()}.")


def judge_shared(reports: Reports) -> Finding:
    """The run directory must be one and the same on both nodes."""
    if wrong := _failures(reports, "shared directory"):
        return problem(
            "shared directory",
            f"the nodes do not see each other's files: {wrong}.",
            "set storage.runs to a directory on a file system that all nodes mount.",
        )
    return ok("shared directory", "files of one node are seen on the other one.")


def judge_sight(reports: Reports) -> Finding:
    """How long a replaced file stays old on another node."""
    if wrong := _failures(reports, "visibility"):
        return problem(
            "visibility",
            f"a file that one node replaced stayed the old one on the other: {wrong}.",
            "ask for a mount without such long attribute caching (NFS: acdirmax, lookupcache), or "
            "set storage.runs to another file system.",
        )
    longest_s = max(reports[0].seen_s)
    text = f"a file that one node replaced is new on the other after {longest_s:.2f} s at most"
    if longest_s > SLOW_SIGHT_S:
        return note(
            "visibility",
            f"{text} (attribute caching). Actors find new weights and a restarted buffer so much "
            "later; nothing else is affected.",
        )
    return ok("visibility", f"{text}.")


def judge_links(reports: Reports) -> Finding:
    """link(2) must have one winner: the buffer's only owner is made by it."""
    cure = (
        "set storage.runs to a file system with POSIX hard links (Lustre, GPFS, NFS, BeeGFS with "
        "them enabled). Without them two buffers could own one run."
    )
    if wrong := _failures(reports, "links"):
        return problem("links", f"hard links do not work: {wrong}.", cure)
    tried = reports[0].links_tried
    won = sorted(number for report in reports for number in report.links_won)
    if won != list(range(tried)):
        twice = len(won) - len(set(won))
        text = f"of {tried} links that both nodes made at once, {twice} were given to both"
        return problem("links", f"{text} and {tried - len(set(won))} to none.", cure)
    return ok("links", f"each of {tried} links that both nodes made at once went to one of them.")


def judge_fsync(reports: Reports) -> Finding:
    if wrong := _failures(reports, "fsync"):
        return problem(
            "fsync",
            f"a file could not be made durable: {wrong}.",
            "set storage.runs to a file system that supports fsync.",
        )
    took = [second for report in reports for second in report.fsync_s]
    typical_s, longest_s = statistics.median(took), max(took)
    text = f"4 KiB are durable after {typical_s * 1e3:.1f} ms (longest {longest_s * 1e3:.0f} ms)"
    if typical_s > TOO_SLOW_FSYNC_S:
        return problem(
            "fsync",
            f"{text}; the buffer answers no request before that.",
            "set storage.runs to a faster file system.",
        )
    if typical_s > SLOW_FSYNC_S:
        return note("fsync", f"{text}; so much every answer of the buffer waits, many at a time.")
    return ok("fsync", f"{text}.")


def judge_sqlite(reports: Reports) -> Finding:
    if wrong := _failures(reports, "sqlite"):
        return problem(
            "sqlite",
            f"a SQLite ledger (WAL, one owner) on the run directory failed: {wrong}.",
            "set storage.runs to a file system with file locks (Lustre: mount option flock).",
        )
    return ok("sqlite", "a SQLite ledger that one node wrote is whole on the other one.")


def judge_reach(reports: Reports, site: Site) -> Finding:
    """Each node must reach the other at one address at least; at the interface's, if one is set."""
    if wrong := _failures(reports, "network"):
        return problem("network", f"the trial of the network failed: {wrong}.", "run it again.")
    over = f" over {site.network.interface}" if site.network.interface else ""
    for report in reports:
        refused = {address: why for address, why in report.reached.items() if why}
        text = ", ".join(f"{address} ({why})" for address, why in refused.items())
        if len(refused) == len(report.reached):
            return problem(
                "network",
                f"{report.host} cannot connect to {report.other}{over}: {text or 'no address'}.",
                "a firewall between compute nodes? Set network.port_range to the ports that are "
                "open, and network.interface to the network that jobs may use.",
            )
        if refused:
            return note(
                "network",
                f"{report.host} does not reach {report.other} at {text}; other addresses work, and "
                "clients try each.",
                "set network.interface to the one that works: it saves the attempts, and NCCL "
                "would not choose the other.",
            )
    return ok("network", f"the nodes reach each other at every address{over}.")


def judge_names(reports: Reports) -> Finding:
    """Ours connect by address; torch and others may use names."""
    wrong = dict.fromkeys(report.resolved for report in reports if report.resolved)
    if wrong:
        text = "; ".join(wrong)
        return note(
            "host names",
            f"names do not resolve on the other node: {text}. Ours connect by address.",
            "tools of your own that use MASTER_ADDR need addresses there.",
        )
    return ok("host names", "each node resolves the other's name.")


def judge_skew(reports: Reports) -> Finding:
    """Leases are durations, so clocks matter little; ages in `dapo status` are by the clock."""
    skews = [abs(report.skew_s) for report in reports if report.skew_s is not None]
    if not skews:
        return note("clocks", "unknown, since no connection was made.")
    text = f"the nodes' clocks differ by {max(skews):.3f} s"
    if max(skews) > TOO_MUCH_SKEW_S:
        return problem(
            "clocks",
            f"{text}; healthy jobs would be taken for silent ones.",
            "report it to the cluster's support: the nodes' time service does not work.",
        )
    if max(skews) > MAX_SKEW_S:
        return note("clocks", f"{text}; ages that `dapo status` shows are wrong by so much.")
    return ok("clocks", f"{text}.")


def judge_collective(reports: Reports) -> Finding:
    """NCCL, or gloo, between the nodes."""
    wrong = _failures(reports, "collective")
    if wrong and "No module named 'torch'" in wrong:
        return note("collective", "not tried: there is no torch on the nodes.")
    if wrong:
        return problem(
            "collective",
            f"an all-reduce across the two nodes failed: {wrong}.",
            'set network.interface to the network between the nodes; with NCCL_DEBUG = "INFO" in '
            "environment.variables the log says what it tried.",
        )
    found = [report.collective for report in reports if report.collective]
    if not found:
        return note("collective", "not tried, since no GPU answered.")
    slowest = min(found, key=lambda result: result["gib_s"])
    return ok(
        "collective",
        f"{slowest['backend']}: 64 MiB summed over two nodes at {slowest['gib_s']:.2f} GiB/s, the "
        f"first after {slowest['seconds']:.1f} s.",
    )


def _failures(reports: Reports, step: str) -> str:
    """'node: reason' of every node where a step failed."""
    wrong = [f"{r.host}: {r.failed[step]}" for r in reports if step in r.failed]
    return "; ".join(dict.fromkeys(wrong))


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words) or "none"
