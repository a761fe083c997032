"""Each thing that can be wrong between a site file and what Slurm has."""

from __future__ import annotations

from typing import Any

import pytest

from dapo_hpc.launch.doctor import settings_checks, slurm_checks
from dapo_hpc.launch.doctor.cluster_view import Partition
from tests.unit.launch.doctor_cases import CONFIG, NODES, FakeSlurm, only_problem, site, view


def test_a_site_that_fits_has_no_problem() -> None:
    found = list(slurm_checks.check_site(site(), view()))
    assert [finding.level for finding in found] == ["ok"] * 6
    assert "2 nodes of partition gpu fit, 2 of them in service" in found[2].text


def test_absent_commands_are_named() -> None:
    def which(name: str) -> str | None:
        return None if name in ("srun", "sinfo") else f"/usr/bin/{name}"

    wrong = only_problem([slurm_checks.check_commands(which)])
    assert wrong.text == "srun, sinfo not found in PATH."
    assert slurm_checks.check_commands(lambda _: "/bin/x").level == "ok"


def test_a_controller_that_is_away_or_down() -> None:
    assert slurm_checks.check_controller(FakeSlurm()).level == "ok"
    away = only_problem([slurm_checks.check_controller(FakeSlurm(ping=None))])
    assert "it is broken" in away.text
    down = FakeSlurm(ping="Slurmctld(primary) at head is DOWN\n")
    assert "is DOWN" in only_problem([slurm_checks.check_controller(down)]).text


@pytest.mark.parametrize(
    ("learner", "said", "cure"),
    [
        ({"partition": "gpuu"}, 'learner.partition = "gpuu"', "one of: gpu, old, preempt"),
        ({"partition": "old"}, "partition old is DOWN", "name another one"),
        ({"time_limit": "2-00:00:00"}, 'time_limit = "2-00:00:00" is more', '"1-00:00:00" or less'),
        ({"account": "gamma"}, "lets in only alpha,beta", "set learner.account to one of these"),
        ({"gpus_per_node": 16}, "learner.gpus_per_node = 16", "to 8 or less"),
        ({"gpu_type": "b200"}, "= 8 of type b200, and the largest", "GPU types there: h100"),
        ({"cpus_per_node": 128}, "learner.cpus_per_node = 128", "to 96 or less"),
        ({"memory_gib": 2000}, "learner.memory_gib = 2000", "to 976 or less"),
        ({"constraint": "gold"}, 'learner.constraint = "gold"', "one of: h100, ib"),
    ],
)
def test_a_table_that_does_not_fit(learner: dict[str, Any], said: str, cure: str) -> None:
    wrong = only_problem(list(slurm_checks.check_site(site(learner=learner), view())))
    assert wrong.check.startswith("learner ")
    assert said in wrong.text
    assert cure in wrong.cure


def test_the_default_partition_is_used_or_missed() -> None:
    unnamed = site(learner={"partition": None})
    partition = slurm_checks.find_partition("learner", unnamed.learner, view())
    assert isinstance(partition, Partition)
    assert partition.name == "gpu"
    none = view(partition="PartitionName=x Default=NO State=UP TotalNodes=1 MaxTime=UNLIMITED\n")
    wrong = only_problem([slurm_checks.find_partition("learner", unnamed.learner, none)])  # type: ignore[list-item]
    assert "no default partition" in wrong.text


def test_nodes_out_of_service_are_a_note() -> None:
    down = view(Node=NODES.replace("|idle|", "|drain|").replace("|mix|", "|down*|"))
    found = list(slurm_checks.check_site(site(), down))
    assert [finding.level for finding in found] == ["ok", "ok", "note"] * 2
    assert "2 nodes of partition gpu fit, 0 of them in service" in found[2].text


def test_slurm_has_the_last_word_on_a_submission() -> None:
    table = site(learner={"qos": "gold", "gpu_type": "h100", "options": ("--licenses=x",)}).learner
    slurm = FakeSlurm()
    assert slurm_checks.check_submission("learner", table, slurm).level == "ok"
    words = slurm.asked[0]
    assert {"--qos=gold", "--gpus-per-node=h100:8", "--licenses=x", "--partition=gpu"} <= set(words)
    refused = slurm_checks.check_submission("learner", table, FakeSlurm(test_only=None))
    assert "it is broken" in only_problem([refused]).text


# ------------------------------------------------------------------ settings of the cluster


def actors_partition(**changes: str) -> Partition:
    found = view().partitions["preempt"]
    return Partition(name=found.name, fields={**found.fields, **changes})


@pytest.mark.parametrize(
    ("mode", "jobs_may_submit", "level", "said"),
    [
        ("REQUEUE", True, "ok", "are requeued"),
        ("OFF", True, "ok", "are not preempted"),
        ("CANCEL", True, "note", "submits lost actors again"),
        ("CANCEL", False, "note", "keeps the learner from replacing them"),
        ("GANG,SUSPEND", True, "problem", "stands still"),
    ],
)
def test_what_preemption_does_to_actors(
    mode: str, jobs_may_submit: bool, level: str, said: str
) -> None:
    partition = actors_partition(PreemptMode=mode)
    config = view().config
    found = settings_checks.check_preemption(partition, config, jobs_may_submit=jobs_may_submit)
    assert found.level == level
    assert said in found.text


def test_a_cluster_without_preemption() -> None:
    config = {"PreemptType": "preempt/none", "PreemptMode": "OFF"}
    found = settings_checks.check_preemption(actors_partition(), config, jobs_may_submit=True)
    assert found.text == "this cluster does not preempt jobs."


@pytest.mark.parametrize(
    ("grace", "parameters", "level", "said"),
    [
        ("120", "preempt_send_user_signal", "ok", "the job's own signal"),
        ("0", "preempt_send_user_signal", "note", "own signal and SIGTERM in the same second"),
        ("0", "(null)", "note", "SIGKILL follows 30 s later"),
        ("120", "(null)", "ok", "SIGTERM (preempt_send_user_signal is off)"),
    ],
)
def test_how_much_notice_there_is(grace: str, parameters: str, level: str, said: str) -> None:
    config = {"KillWait": "30 sec", "SlurmctldParameters": parameters}
    partition = actors_partition(GraceTime=grace)
    found = settings_checks.check_notice(partition, config, drain_s=60)
    assert found.level == level
    assert said in found.text


def test_requeue_arrays_and_accounting() -> None:
    assert settings_checks.check_requeue({"JobRequeue": "1"}, successors=0).level == "ok"
    forbidden = settings_checks.check_requeue({"JobRequeue": "0"}, successors=0)
    assert forbidden.level == "note"
    assert "learner.successors" in forbidden.cure
    assert settings_checks.check_requeue({"JobRequeue": "0"}, successors=3).level == "ok"

    assert settings_checks.check_arrays({"MaxArraySize": "1001"}).level == "ok"
    assert settings_checks.check_arrays({"MaxArraySize": "101"}).level == "note"
    assert only_problem([settings_checks.check_arrays({"MaxArraySize": "1"})])

    assert settings_checks.check_accounting(FakeSlurm()).level == "ok"
    without = settings_checks.check_accounting(FakeSlurm(sacct=None))
    assert without.level == "note"
    assert ".result()" in without.text


def test_all_settings_of_a_cluster_are_reported() -> None:
    found = list(settings_checks.check_settings(site(), view(), FakeSlurm()))
    checks = ["preemption", "notice", "requeue", "arrays", "accounting"]
    assert [finding.check for finding in found] == checks
    assert "KillWait" in CONFIG
    assert "150 s later (GraceTime 120 s, KillWait 30 s)" in found[1].text
