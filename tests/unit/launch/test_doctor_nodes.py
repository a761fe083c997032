"""What two nodes find out together, and what is made of each way it can go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dapo_hpc.launch.doctor import inside, meeting, verdicts
from dapo_hpc.launch.doctor.findings import Finding
from dapo_hpc.launch.doctor.meeting import Clock, Meeting, Unheard
from dapo_hpc.launch.doctor.node_report import NodeReport
from dapo_hpc.launch.site import Site
from tests.unit.launch.doctor_cases import only_problem, site

VERSIONS = {"python": "3.11.2", "dapo-hpc": "0.1.0", "torch": "2.13.0"}


def as_two_nodes(directory: Path, part: Callable[[Meeting], Any]) -> list[Any]:
    """Run a part of the trial as rank 0 and 1 at the same time."""
    results: dict[int, Any] = {}

    def run(rank: int) -> None:
        together = Meeting(directory=directory, rank=rank, world=2, patience_s=20)
        results[rank] = part(together)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[0], results[1]]


def test_two_nodes_on_a_good_file_system(tmp_path: Path) -> None:
    reports = [NodeReport(rank=rank, host=f"n{rank + 1}") for rank in (0, 1)]
    plain = site(learner={"gpus_per_node": 0})

    def part(together: Meeting) -> None:
        inside.meet(reports[together.rank], together, plain)

    for report in reports:
        report.versions = VERSIONS
        report.addresses = ["127.0.0.1"]
    as_two_nodes(tmp_path, part)
    assert [report.failed for report in reports] == [{}, {}]
    found = list(verdicts.judge(reports, plain, plain.learner))
    assert not [finding for finding in found if finding.level == "problem"]
    assert {"links", "sqlite", "clocks", "network", "visibility"} <= {f.check for f in found}


def test_a_node_that_never_speaks_is_unheard(tmp_path: Path) -> None:
    alone = Meeting(directory=tmp_path, rank=0, world=2, patience_s=0.05)
    with pytest.raises(Unheard, match="hello-1.json, which the other node wrote"):
        alone.hear("hello")
    report = NodeReport(rank=0, host="n1")
    inside.meet(report, alone, site())
    assert "shared directory" in report.failed
    silent = NodeReport(rank=1, host="n2", failed=report.failed)
    wrong = only_problem([verdicts.judge_shared([report, silent])])
    assert "storage.runs" in wrong.cure


def test_links_have_one_winner_each(tmp_path: Path) -> None:
    first, second = as_two_nodes(tmp_path, meeting.links_won)
    assert sorted(first + second) == list(range(meeting.NUM_LINKS))


def test_a_ledger_with_a_lost_row_is_noticed(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.sqlite"
    meeting.write_ledger(ledger)
    meeting.read_ledger(ledger)
    with meeting.sqlite3.connect(ledger) as broken:
        broken.execute("DELETE FROM events WHERE number = 7")
    with pytest.raises(meeting.sqlite3.DatabaseError, match="19 rows of 20"):
        meeting.read_ledger(ledger)


def test_the_clock_listens_in_the_port_range_only() -> None:
    free = Clock(None)
    assert abs(meeting.ask_time("127.0.0.1", free.port)) < 1
    with pytest.raises(OSError, match="no free port in network.port_range"):
        Clock((free.port, free.port))
    free.close()


@pytest.mark.slow
def test_an_all_reduce_of_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("torch")

    def part(together: Meeting) -> dict[str, Any]:
        return inside.collective(together, ["127.0.0.1"])

    for result in as_two_nodes(tmp_path, part):
        assert result["backend"] in ("gloo", "nccl")
        assert result["gib_s"] > 0


ALONE = """
name = "x"
[learner]
cpus_per_node = 1
time_limit = "1:00:00"
[actors]
cpus_per_node = 1
time_limit = "1:00:00"
[network]
interface = "none0"
[storage]
node_cache = "%s/cache"
"""


def test_the_report_of_a_node_alone(tmp_path: Path) -> None:
    """The real command of a trial with one node, as Slurm would start it."""
    (tmp_path / "site.toml").write_text(ALONE % tmp_path)
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURMD_NODENAME": "n1"}
    words = [sys.executable, "-m", "dapo_hpc.cli", "doctor", "--inside", str(tmp_path)]
    subprocess.run(words, env=os.environ | slurm, check=True)
    report = NodeReport(**json.loads((tmp_path / "report-0.json").read_text()))
    assert report.host == "n1"
    assert report.interface_addresses == []
    assert report.steps == ["node cache"]
    assert report.versions["python"].startswith("3.")


# ------------------------------------------------------------------ what is made of it


def good(rank: int) -> NodeReport:
    return NodeReport(
        rank=rank,
        host=f"n{rank + 1}",
        other=f"n{2 - rank}",
        versions=VERSIONS,
        addresses=[f"10.0.0.{rank + 1}"],
        interface_addresses=[f"10.1.0.{rank + 1}"],
        free_ports=100,
        reached={f"10.1.0.{2 - rank}": ""},
        skew_s=0.001,
        fsync_s=[0.002, 0.003],
        seen_s=[0.01] if rank == 0 else [],
        links_won=[0, 1] if rank == 0 else [2],
        links_tried=3,
        gpus=["NVIDIA H100, 570.1, 81559 MiB"],
        collective={"backend": "nccl", "seconds": 1.0, "gib_s": 20.0},
        has_internet=True,
    )


FULL = site(
    network={"interface": "ib0", "port_range": (7000, 7099)}, storage={"node_cache": "/tmp/x"}
)


def verdict(where: Site = FULL, **changes: Any) -> list[Finding]:
    """With some fields of the second node's report changed."""
    return list(verdicts.judge([good(0), replace(good(1), **changes)], where, where.learner))


def test_good_reports_have_no_problem() -> None:
    assert {finding.level for finding in verdict()} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "check", "said", "cure"),
    [
        ({"versions": VERSIONS | {"torch": "2.12.0"}}, "versions", "2.12.0 on n2", "environment"),
        ({"versions": VERSIONS | {"torch": ""}}, "versions", "none on n2", "environment"),
        ({"interface_addresses": []}, "interface on nodes", "no IPv4 address on n2", "ip -br addr"),
        ({"free_ports": 0}, "port range", "0 on n2", "port_range"),
        ({"failed": {"node cache": "read-only"}}, "node cache", "n2: read-only", "/tmp/$USER"),
        ({"gpus": [], "failed": {"gpus": "nvidia-smi is not there"}}, "gpus", "n2: nvidia", "--nv"),
        ({"gpus": []}, "gpus", "no GPU answers: n2", "exclude"),
        ({"failed": {"shared directory": "unseen"}}, "shared directory", "n2: unseen", "runs"),
        ({"failed": {"visibility": "stays old"}}, "visibility", "stays old", "lookupcache"),
        ({"links_won": [1, 2]}, "links", "1 were given to both", "POSIX"),
        ({"links_won": []}, "links", "1 to none", "POSIX"),
        ({"failed": {"links": "Operation not supported"}}, "links", "not supported", "POSIX"),
        ({"failed": {"fsync": "Invalid argument"}}, "fsync", "Invalid argument", "fsync"),
        ({"fsync_s": [3.0] * 9}, "fsync", "3000.0 ms", "faster"),
        ({"failed": {"sqlite": "locking protocol"}}, "sqlite", "locking protocol", "flock"),
        ({"reached": {"10.1.0.1": "timed out"}}, "network", "10.1.0.1 (timed out)", "firewall"),
        ({"reached": {}}, "network", "no address", "firewall"),
        ({"failed": {"network": "reset"}}, "network", "reset", "again"),
        ({"skew_s": -300.0}, "clocks", "differ by 300.000 s", "time service"),
        ({"failed": {"collective": "NCCL error"}}, "collective", "NCCL error", "NCCL_DEBUG"),
    ],
)
def test_each_fault_of_the_nodes(changes: dict[str, Any], check: str, said: str, cure: str) -> None:
    wrong = only_problem(verdict(**changes))
    assert wrong.check == check
    assert said in wrong.text
    assert cure in wrong.cure


@pytest.mark.parametrize(
    ("changes", "check", "said"),
    [
        ({"free_ports": 3}, "port range", "each run on a node takes one"),
        ({"has_internet": False}, "internet", "no way to huggingface.co from n2"),
        ({"gpus": ["NVIDIA A100, 570.1, 81920 MiB"]}, "gpus", "the nodes differ"),
        ({"fsync_s": [0.2] * 9}, "fsync", "200.0 ms"),
        ({"reached": {"10.1.0.1": "", "10.2.0.1": "refused"}}, "network", "10.2.0.1 (refused)"),
        ({"resolved": "n1: unknown"}, "host names", "n1: unknown"),
        ({"skew_s": 10.0}, "clocks", "differ by 10.000 s"),
        ({"failed": {"collective": "No module named 'torch'"}}, "collective", "no torch"),
    ],
)
def test_what_is_worth_knowing_and_no_problem(
    changes: dict[str, Any], check: str, said: str
) -> None:
    notes = [finding for finding in verdict(**changes) if finding.level != "ok"]
    assert [(finding.check, finding.level) for finding in notes] == [(check, "note")]
    assert said in notes[0].text


def test_slow_attribute_caching_is_a_note() -> None:
    slow = replace(good(0), seen_s=[0.1, 31.0])
    found = verdicts.judge_sight([slow, good(1)])
    assert found.level == "note"
    assert "31.00 s" in found.text


def test_offline_nodes_that_say_so_are_fine() -> None:
    offline = {"has_internet": False, "environment": {"HF_HUB_OFFLINE": "1"}}
    assert {finding.level for finding in verdict(**offline)} == {"ok"}


def test_one_node_alone_leaves_the_rest_unknown() -> None:
    found = list(verdicts.judge([good(0)], FULL, FULL.learner))
    assert found[-1].check == "two nodes"
    assert found[-1].level == "note"
