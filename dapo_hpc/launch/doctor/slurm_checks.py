"""Checks on the login node: Slurm answers, and has what the site file asks for."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

from dapo_hpc.launch.doctor.cluster_view import ClusterView, Node, Partition, Run
from dapo_hpc.launch.doctor.findings import Finding, note, ok, problem
from dapo_hpc.launch.site import JobTable, Site, time_limit_s
from dapo_hpc.launch.slurm import SlurmRefused, SlurmUnavailable

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "srun", "sinfo")


def check_commands(which: Callable[[str], str | None] = shutil.which) -> Finding:
    """Whether Slurm's commands are there."""
    missing = [name for name in COMMANDS if which(name) is None]
    if missing:
        return problem(
            "commands",
            f"{', '.join(missing)} not found in PATH.",
            "run `dapo doctor` on a login node of the cluster, or load the module that brings "
            "Slurm's commands.",
        )
    return ok("commands", f"{', '.join(COMMANDS)} are in PATH.")


def check_controller(run: Run) -> Finding:
    """Whether slurmctld answers, with its version."""
    try:
        version = run(["sinfo", "--version"]).strip()
        said = run(["scontrol", "ping"])
    except (SlurmRefused, SlurmUnavailable) as away:
        return problem(
            "controller",
            f"the Slurm controller does not answer: {' '.join(str(away).split())}",
            "try `sinfo`; if that fails too, ask the cluster's support, or wait for its return.",
        )
    if "is UP" not in said:
        return problem(
            "controller",
            f"`scontrol ping` says: {' '.join(said.split())}",
            "wait until the controller is back; jobs that run are not harmed.",
        )
    return ok("controller", f"{version}: {said.strip().splitlines()[0]}.")


def check_site(site: Site, view: ClusterView) -> Iterator[Finding]:
    """Every table of the site file against the partitions and nodes that there are."""
    for kind, table in site.tables().items():
        partition = find_partition(kind, table, view)
        if isinstance(partition, Finding):
            yield partition
            continue
        yield check_time_limit(kind, table, partition)
        yield check_account(kind, table, partition)
        yield check_nodes(kind, table, partition, view.nodes_of(partition.name))


def find_partition(kind: str, table: JobTable, view: ClusterView) -> Partition | Finding:
    """The partition a table names, or what is wrong with it."""
    check = f"{kind} partition"
    name = table.partition or view.default_partition()
    names = ", ".join(sorted(view.partitions)) or "none"
    if name is None:
        return problem(
            check,
            f"{kind}.partition is not set, and the cluster has no default partition.",
            f"set {kind}.partition to one of: {names}.",
        )
    partition = view.partitions.get(name)
    if partition is None:
        return problem(
            check,
            f'{kind}.partition = "{name}", and there is no such partition here.',
            f"set {kind}.partition to one of: {names}.",
        )
    if partition["State"] not in ("UP", ""):
        return problem(
            check,
            f"partition {name} is {partition['State']}; it starts no jobs.",
            "wait until it is up again, or name another one.",
        )
    return partition


def check_time_limit(kind: str, table: JobTable, partition: Partition) -> Finding:
    """Whether the table's time limit is within the partition's."""
    check, longest = f"{kind} time limit", partition["MaxTime"]
    if longest in ("UNLIMITED", "INFINITE", ""):
        return ok(check, f"{table.time_limit}; partition {partition.name} sets no limit.")
    if time_limit_s(table.time_limit) > time_limit_s(longest):
        return problem(
            check,
            f'{kind}.time_limit = "{table.time_limit}" is more than partition {partition.name} '
            f"allows ({longest}): the job would wait for ever (PartitionTimeLimit) or be refused.",
            f'set {kind}.time_limit = "{longest}" or less; a run goes on in the next job.',
        )
    return ok(check, f"{table.time_limit}; partition {partition.name} allows {longest}.")


def check_account(kind: str, table: JobTable, partition: Partition) -> Finding:
    """Whether the partition's own lists let account and QOS in."""
    check = f"{kind} account"
    for key, value in (("account", table.account), ("qos", table.qos)):
        listed = {"account": "AllowAccounts", "qos": "AllowQos"}[key]
        if value and not partition.allows(listed, value):
            return problem(
                check,
                f'{kind}.{key} = "{value}", and partition {partition.name} lets in only '
                f"{partition[listed]}.",
                f"set {kind}.{key} to one of these, or {kind}.partition to another one.",
            )
    named = [f"{key} {value}" for key in ("account", "qos") if (value := getattr(table, key))]
    return ok(check, f"{' and '.join(named) or 'your default account'} may use the partition.")


def check_nodes(kind: str, table: JobTable, partition: Partition, nodes: list[Node]) -> Finding:
    """Whether the partition has nodes with what the table says that a node has."""
    check = f"{kind} nodes"
    fitting = nodes
    for key in ("gpus_per_node", "cpus_per_node", "memory_gib"):
        wanted = int(getattr(table, key))
        most = max((_has(node, key, table) for node in fitting), default=0)
        fitting = [node for node in fitting if _has(node, key, table) >= wanted]
        if not fitting:
            is_gpu = key == "gpus_per_node"
            of_type = f" of type {table.gpu_type}" if is_gpu and table.gpu_type else ""
            return problem(
                check,
                f"{kind}.{key} = {wanted}{of_type}, and the largest node of partition "
                f"{partition.name} has {most}.",
                f"set {kind}.{key} to {most} or less, or {kind}.partition to another one"
                f"{_types(nodes) if is_gpu else ''}.",
            )
    # Slurm's own language of features (&, |, counts) is left to Slurm: check_submission.
    if table.constraint and table.constraint.replace("_", "").isalnum():
        fitting = [node for node in fitting if table.constraint in node.features]
        if not fitting:
            features = sorted({name for node in nodes for name in node.features})
            return problem(
                check,
                f'{kind}.constraint = "{table.constraint}", and no node of partition '
                f"{partition.name} has this feature.",
                f"set {kind}.constraint to one of: {', '.join(features) or '(there is none)'}.",
            )
    usable = sum(node.is_usable for node in fitting)
    text = f"{len(fitting)} nodes of partition {partition.name} fit, {usable} of them in service."
    if not usable:
        return note(check, text, "jobs wait until one is back; `sinfo -R` says why they are not.")
    return ok(check, text)


def _has(node: Node, key: str, table: JobTable) -> int:
    """How much a node has of what a key of the table asks for."""
    if key == "gpus_per_node":
        return node.num_gpus(table.gpu_type)
    return node.cpus if key == "cpus_per_node" else node.memory_mib // 1024


def _types(nodes: list[Node]) -> str:
    found = sorted({kind or "without type" for node in nodes for kind in node.gpus})
    return f"; GPU types there: {', '.join(found)}" if found else ""


def check_submission(kind: str, table: JobTable, run: Run) -> Finding:
    """Ask Slurm itself whether it would take a job of this table (sbatch --test-only)."""
    words = ["sbatch", "--test-only", "--nodes=1", f"--time={table.time_limit}", "--wrap=true"]
    for key in ("partition", "account", "qos", "constraint", "exclude"):
        if value := getattr(table, key):
            words.append(f"--{key}={value}")
    if table.gpus_per_node:
        of_type = f"{table.gpu_type}:" if table.gpu_type else ""
        words.append(f"--gpus-per-node={of_type}{table.gpus_per_node}")
    try:
        run([*words, *table.options])
    except (SlurmRefused, SlurmUnavailable) as refused:
        return problem(
            f"{kind} submission",
            f"Slurm would not take a job of [{kind}]: {' '.join(str(refused).split())}",
            f"correct partition, account, qos, options or time_limit of [{kind}]; `sacctmgr show "
            "assoc user=$USER` lists the accounts you may use.",
        )
    return ok(f"{kind} submission", f"Slurm would take a job of [{kind}] as it is.")
