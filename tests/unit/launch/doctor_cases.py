"""A site, and a cluster in the words of Slurm 22.05, for the doctor's tests to break."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dapo_hpc.launch.doctor.cluster_view import ClusterView, look
from dapo_hpc.launch.doctor.findings import Finding
from dapo_hpc.launch.site import Site
from dapo_hpc.launch.slurm import SlurmRefused

PARTITIONS = """\
PartitionName=gpu AllowGroups=ALL AllowAccounts=alpha,beta AllowQos=ALL Default=YES \
GraceTime=0 MaxNodes=UNLIMITED MaxTime=1-00:00:00 Nodes=n[1-2] PriorityTier=100 \
PreemptMode=OFF State=UP TotalNodes=2
PartitionName=preempt AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=NO \
GraceTime=120 MaxNodes=UNLIMITED MaxTime=UNLIMITED Nodes=n[1-3] PriorityTier=1 \
PreemptMode=REQUEUE State=UP TotalNodes=3
PartitionName=old AllowAccounts=ALL AllowQos=ALL Default=NO GraceTime=0 MaxTime=30 \
PreemptMode=OFF State=DOWN TotalNodes=1
"""
NODES = """\
n1|gpu|96|1000000|gpu:h100:8(S:0-1)|idle|ib,h100
n2|gpu|96|1000000|gpu:h100:8(S:0-1)|mix|ib,h100
n1|preempt|96|1000000|gpu:h100:8(S:0-1)|idle|ib,h100
n2|preempt|96|1000000|gpu:h100:8(S:0-1)|mix|ib,h100
n3|preempt|32|250000|gpu:a100:4,nvme:1|down*|(null)
"""
CONFIG = """\
Configuration data as of 2026-11-21T21:00:00
JobRequeue              = 1
KillWait                = 30 sec
MaxArraySize            = 1001
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
SlurmctldParameters     = preempt_send_user_signal,enable_configless

Slurmctld(primary) at head is UP
"""


class FakeSlurm:
    """Answers words with text; with SlurmRefused where the text is None. For faults."""

    def __init__(self, **answers: str | None) -> None:
        self.answers = answers
        self.asked: list[Sequence[str]] = []

    def __call__(self, words: Sequence[str]) -> str:
        self.asked.append(words)
        by_words = {
            "partition": PARTITIONS,
            "--Node": NODES,
            "config": CONFIG,
            "ping": "Slurmctld(primary) at head is UP\n",
            "--version": "slurm-wlm 22.05.8\n",
            "--test-only": "",
            "sacct": "",
        }
        for key, usual in by_words.items():
            if key in words:
                answer = self.answers.get(key.strip("-").replace("-", "_"), usual)
                if answer is None:
                    raise SlurmRefused(f"{words[0]} was refused (exit 1): it is broken")
                return answer
        raise AssertionError(f"nobody expected {words}")


def view(**answers: str) -> ClusterView:
    return look(FakeSlurm(**answers))


LEARNER: dict[str, Any] = {
    "partition": "gpu",
    "account": "alpha",
    "gpus_per_node": 8,
    "cpus_per_node": 96,
    "memory_gib": 900,
    "time_limit": "24:00:00",
}
ACTORS: dict[str, Any] = {
    "partition": "preempt",
    "gpus_per_node": 8,
    "cpus_per_node": 96,
    "time_limit": "12:00:00",
}


def site(
    *, learner: dict[str, Any] | None = None, actors: dict[str, Any] | None = None, **rest: Any
) -> Site:
    """A site that fits `view()`, with some values changed."""
    tables = {"learner": LEARNER | (learner or {}), "actors": ACTORS | (actors or {})}
    return Site.model_validate({"name": "test", **tables, **rest})


def only_problem(findings: Sequence[Finding]) -> Finding:
    """The one problem among findings; it has a cure."""
    wrong = [found for found in findings if found.level == "problem"]
    assert len(wrong) == 1, findings
    assert wrong[0].cure
    return wrong[0]
