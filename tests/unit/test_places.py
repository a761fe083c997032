"""How processes on different nodes know who they are and where they may be found."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dapo_hpc.buffer import server
from dapo_hpc.buffer.endpoint import publish_endpoint, read_endpoint
from dapo_hpc.network import local_addresses
from dapo_hpc.rank import Rank
from dapo_hpc.run_dir import RunDir
from dapo_hpc.signals import HANDED_OVER, blocked_in_children


def test_an_interface_is_one_of_those_there_are() -> None:
    assert local_addresses("lo") == ["127.0.0.1"]
    assert "127.0.0.1" not in local_addresses()
    with pytest.raises(ValueError, match=r"no network interface 'ib7' .* it has .*lo"):
        local_addresses("ib7")


def test_the_endpoint_names_one_interface_if_told_so(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    publish_endpoint(run, 4000, 1, "lo")
    assert read_endpoint(run).addresses == ["127.0.0.1"]
    publish_endpoint(run, 4000, 2)
    assert read_endpoint(run).addresses == local_addresses()


def test_the_run_or_the_cluster_says_which_ports() -> None:
    assert server.allowed_ports(0, None) == range(1)
    assert server.allowed_ports(0, range(40000, 40011)) == range(40000, 40011)
    assert server.allowed_ports(40005, range(40000, 40011)) == range(40005, 40006)
    with pytest.raises(ValueError, match=r"buffer.port = 9000 .* 40000 to 40010"):
        server.allowed_ports(9000, range(40000, 40011))


def test_a_taken_port_of_the_range_is_passed_over() -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with server._listen(range(port, port + 20)) as listener:
            assert port < listener.getsockname()[1] < port + 20
        with pytest.raises(OSError, match=rf"port {port} \(buffer.port\) is in use"):
            server._listen(range(port, port + 1))


def test_a_task_of_a_step_knows_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PROCID", 9), ("NTASKS", 16), ("LOCALID", 1)):
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert Rank.of_step() == Rank(rank=9, world=16, local=1)
    monkeypatch.delenv("SLURM_PROCID")
    with pytest.raises(ValueError, match="SLURM_PROCID is not set"):
        Rank.of_step()


BLOCKED = "import json, signal; print(json.dumps([s.value for s in signal.pthread_sigmask(0, [])]))"


def test_children_are_deaf_to_what_their_step_is_sent_and_we_are_not() -> None:
    words = [sys.executable, "-c", BLOCKED]
    with blocked_in_children():
        inside = subprocess.run(words, capture_output=True, check=True).stdout
    after = subprocess.run(words, capture_output=True, check=True).stdout
    assert set(json.loads(inside)) >= {number.value for number in HANDED_OVER}
    assert not set(json.loads(after)) & {number.value for number in HANDED_OVER}
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & HANDED_OVER
