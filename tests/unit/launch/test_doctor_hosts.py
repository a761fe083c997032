"""Each thing that can be wrong on a host: directories, proxies, interfaces, ports; the report."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from dapo_hpc.launch.doctor import host_checks
from dapo_hpc.launch.doctor.findings import (
    CHECK_WIDTH,
    as_json,
    has_problems,
    line,
    note,
    ok,
    problem,
    summary,
)
from tests.unit.launch.doctor_cases import only_problem

PASSED = ("HOME", "USER", "PATH", "LANG")


class FakeSpace:
    """A file system with so much room."""

    def __init__(self, *, gib: float = 1000, files: int = 10**6, counts_files: bool = True) -> None:
        self.f_frsize = 2**20
        self.f_bavail = int(gib * 2**10)
        self.f_favail = files
        self.f_files = 10**7 if counts_files else 0


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir(mode=0o755)
    return tmp_path / "runs"


def test_a_good_runs_directory(runs: Path) -> None:
    found = host_checks.check_runs_directory(runs, lambda _: FakeSpace())  # type: ignore[arg-type, return-value]
    assert [finding.level for finding in found] == ["ok", "ok"]
    absent = host_checks.check_runs_directory(runs / "a" / "b")
    assert f"(to be made in {runs})" in absent[0].text
    assert not (runs / "a").exists()


def test_a_runs_directory_that_is_a_file(runs: Path) -> None:
    (runs / "file").write_text("")
    wrong = only_problem(host_checks.check_runs_directory(runs / "file"))
    assert "is not a directory" in wrong.text


def test_a_runs_directory_one_cannot_write_to(runs: Path) -> None:
    found = host_checks.check_runs_directory(runs / "mine", may_write=lambda _: False)
    assert f"{runs} is not writable" in only_problem(found).text


@pytest.mark.parametrize(
    ("mode", "level"), [(0o777, "problem"), (0o1777, "note"), (0o775, "note"), (0o755, "ok")]
)
def test_who_else_may_write_to_the_runs_directory(runs: Path, mode: int, level: str) -> None:
    runs.chmod(mode)
    assert host_checks.check_runs_directory(runs)[0].level == level


def test_a_full_file_system(runs: Path) -> None:
    def level(space: FakeSpace) -> str:
        return host_checks.check_space(runs, space).level  # type: ignore[arg-type]

    assert level(FakeSpace(gib=10)) == "note"
    assert level(FakeSpace(files=100)) == "problem"
    assert level(FakeSpace(files=0, counts_files=False)) == "ok"


def test_proxies_are_named_and_told_from_those_that_reach_the_jobs() -> None:
    assert host_checks.check_proxies({}, PASSED).level == "ok"
    environment = {"HTTPS_PROXY": "http://proxy:3128", "no_proxy": "localhost"}
    here = host_checks.check_proxies(environment, PASSED)
    assert here.level == "ok"
    assert "HTTPS_PROXY set here" in here.text
    assert "proxy:3128" not in here.text, "a proxy's address may hold a password"
    given = host_checks.check_proxies(environment, (*PASSED, "HTTPS_PROXY"))
    assert given.level == "note"
    assert "environment.passed" in given.cure


def test_an_interface_that_only_compute_nodes_have_is_a_note() -> None:
    assert host_checks.check_interface_here(None, lambda: ["lo"]).level == "ok"
    assert host_checks.check_interface_here("ib0", lambda: ["lo", "ib0"]).level == "ok"
    absent = host_checks.check_interface_here("ib0", lambda: ["lo", "eth0"])
    assert absent.level == "note"
    assert "lo, eth0" in absent.text
    assert "lo" in host_checks.interface_names()


def test_a_taken_port_is_not_free() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        assert host_checks.num_free_ports((port, port)) == 0
    assert host_checks.num_free_ports((port, port)) == 1


def test_findings_as_text_and_for_a_program() -> None:
    fine = [ok("one", "it works."), note("two", "it is slow.", "wait.")]
    assert not has_problems(fine)
    assert line(fine[0]) == f"ok       one{' ' * (CHECK_WIDTH - 1)}it works."
    assert line(fine[1]).splitlines()[1].strip() == "-> wait."
    assert summary(fine) == "2 checks, no problems."
    broken = [*fine, problem("three", "it fails.", "mend it.")]
    assert has_problems(broken)
    assert line(broken[2]).startswith("PROBLEM  three ")
    assert summary(broken) == "3 checks, 1 problem: three."
    assert as_json(broken)["problems"] == 1
    assert as_json(broken)["findings"][2] == {
        "check": "three",
        "level": "problem",
        "text": "it fails.",
        "cure": "mend it.",
    }
