"""The configuration files of a cluster, as text."""

from __future__ import annotations

import os

from slurm.mini.shape import NODE_PREFIX, Place, Record, host_name, user_name

MAX_TIME = "2-00:00:00"


def slurm_conf(place: Place, record: Record) -> str:
    shape, root = record.shape, place.root
    address = f"{record.subnet}.1" if record.subnet else "127.0.0.1"
    lines = [
        f"ClusterName={place.cluster_name}",
        f"SlurmctldHost={host_name()}({address})",
        f"SlurmctldPort={record.ports['slurmctld']}",
        f"SlurmUser={user_name()}",
        f"SlurmdUser={user_name()}",
        "AuthType=auth/munge",
        # The default of 120 s would hold every requeued job back for two minutes; 2 is refused.
        f"AuthInfo=socket={place.munge_socket},cred_expire=6",
        "CredType=cred/munge",
        f"StateSaveLocation={root}/state",
        f"SlurmdSpoolDir={root}/spool/%n",
        f"SlurmctldPidFile={root}/run/slurmctld.pid",
        f"SlurmdPidFile={root}/run/slurmd-%n.pid",
        f"SlurmctldLogFile={place.log}/slurmctld.log",
        f"SlurmdLogFile={place.log}/slurmd-%n.log",
        "MailProg=/bin/true",
        "MpiDefault=none",
        "SwitchType=switch/none",
        # Nothing that needs control groups: limits of memory and processors are not enforced.
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "PropagateResourceLimits=NONE",
        "PropagatePrioProcess=0",
        # A node may say that it has more processors than the machine.
        "SlurmdParameters=config_overrides",
        "LaunchParameters=enable_nss_slurm",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "DefMemPerCPU=100",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,"
        "bf_interval=1,bf_yield_interval=100000,bf_continue,default_queue_depth=1000,"
        "preempt_youngest_first,nohold_on_prolog_fail",
        "PriorityType=priority/basic",
        "MinJobAge=3600",
        "MaxJobCount=2000",
        "SlurmctldTimeout=10",
        "SlurmdTimeout=4",
        "InactiveLimit=0",
        "KillWait=5",
        "WaitTime=0",
        "CompleteWait=0",
        "OverTimeLimit=0",
        "MessageTimeout=10",
        "TCPTimeout=2",
        "BatchStartTimeout=10",
        "UnkillableStepTimeout=30",
        # With `slurmd -b`: a node that comes back within SlurmdTimeout is seen to have rebooted,
        # although the kernel's uptime says that it has not.
        "ReturnToService=1",
        "TreeWidth=50",
        "JobRequeue=1",
        "PreemptType=preempt/partition_prio",
        f"PreemptMode={shape.preempt_mode}",
        "PreemptExemptTime=-1",
        *(["SlurmctldParameters=preempt_send_user_signal"] if shape.user_signal else []),
        *(["GresTypes=gpu"] if shape.gpus else []),
        *_accounting(place, record, address),
        *_nodes(record),
        f"PartitionName=learner Nodes=ALL Default=YES MaxTime={MAX_TIME} DefaultTime=01:00:00 "
        "PriorityTier=100 PreemptMode=OFF State=UP",
        f"PartitionName=rollout Nodes=ALL MaxTime={MAX_TIME} DefaultTime=01:00:00 "
        f"PriorityTier=1 PreemptMode={shape.preempt_mode} GraceTime={shape.grace_s} State=UP",
    ]
    return "\n".join(lines) + "\n"


def _accounting(place: Place, record: Record, address: str) -> list[str]:
    if not record.shape.accounting:
        return ["AccountingStorageType=accounting_storage/none"]
    return [
        "AccountingStorageType=accounting_storage/slurmdbd",
        f"AccountingStorageHost={address}",
        f"AccountingStoragePort={record.ports['slurmdbd']}",
        # The way from slurmctld to slurmdbd does not look at AuthInfo.
        f"AccountingStoragePass={place.munge_socket}",
        *(["AccountingStorageTRES=gres/gpu"] if record.shape.gpus else []),
        "AccountingStoreFlags=job_comment",
    ]


def _nodes(record: Record) -> list[str]:
    shape = record.shape
    gres = f" Gres=gpu:{shape.gpu_type}:{shape.gpus}" if shape.gpus else ""
    what = f"CPUs={shape.cpus} RealMemory={shape.memory_mib}{gres} State=UNKNOWN"
    return [f"NodeName={name} {_where(record, name)} {what}" for name in shape.node_names()]


def _where(record: Record, name: str) -> str:
    if record.subnet:
        return f"NodeAddr={node_address(record, name)}"
    return f"NodeHostname={host_name()} NodeAddr=127.0.0.1 Port={record.ports[name]}"


def node_address(record: Record, name: str) -> str:
    return f"{record.subnet}.{10 + int(name.removeprefix(NODE_PREFIX))}"


def gres_conf(place: Place, record: Record) -> str:
    shape = record.shape
    if not shape.gpus:
        return "AutoDetect=off\n"
    nodes = f"{NODE_PREFIX}[1-{shape.nodes}]"
    files = f"{place.root}/dev/nvidia[0-{shape.gpus - 1}]"
    return f"AutoDetect=off\nNodeName={nodes} Name=gpu Type={shape.gpu_type} File={files}\n"


def cgroup_conf() -> str:
    return "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"


def slurmdbd_conf(place: Place, record: Record, password: str) -> str:
    address = f"{record.subnet}.1" if record.subnet else "127.0.0.1"
    lines = [
        "AuthType=auth/munge",
        f"AuthInfo=socket={place.munge_socket}",
        f"DbdHost={host_name()}",
        f"DbdAddr={address}",
        f"DbdPort={record.ports['slurmdbd']}",
        f"SlurmUser={user_name()}",
        f"PidFile={place.root}/run/slurmdbd.pid",
        f"LogFile={place.log}/slurmdbd.log",
        "StorageType=accounting_storage/mysql",
        "StorageHost=127.0.0.1",
        f"StoragePort={record.ports['mariadbd']}",
        "StorageUser=slurm",
        f"StoragePass={password}",
        "StorageLoc=slurm_acct_db",
    ]
    return "\n".join(lines) + "\n"


def hosts(record: Record) -> str:
    """/etc/hosts of the nodes in the root form."""
    lines = ["127.0.0.1 localhost", f"{record.subnet}.1 {host_name()}"]
    lines += [f"{node_address(record, name)} {name}" for name in record.shape.node_names()]
    return "\n".join(lines) + "\n"


def write_all(place: Place, record: Record, password: str) -> None:
    """Every file that does not depend on what runs; the caller has made the directories."""
    place.conf.write_text(slurm_conf(place, record))
    (place.root / "gres.conf").write_text(gres_conf(place, record))
    (place.root / "cgroup.conf").write_text(cgroup_conf())
    if record.subnet:
        (place.root / "hosts").write_text(hosts(record))
    if record.shape.accounting:
        path = place.root / "slurmdbd.conf"
        path.touch(mode=0o600)
        os.chmod(path, 0o600)
        path.write_text(slurmdbd_conf(place, record, password))
    for number in range(record.shape.gpus):
        _fake_gpu(place, number)


def _fake_gpu(place: Place, number: int) -> None:
    """Slurm takes the number from the name and asks only whether it is a device; /dev/null is."""
    (place.root / "dev" / f"nvidia{number}").symlink_to("/dev/null")
