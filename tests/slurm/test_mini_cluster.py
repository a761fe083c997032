"""The mini cluster itself: it behaves like Slurm, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from slurm.mini import shape
from slurm.mini.processes import processes
from tests.slurm import clusters
from tests.slurm.clusters import ROOT, MiniCluster, mini, need_slurm, wait_for
from tests.slurm.conftest import MakeCluster

NODE = "mn1"
IGNORE_SIGNALS = "trap '' TERM USR2; while :; do sleep 1; done"


def traces(name: str) -> list[str]:
    """What a cluster has on this machine: processes, directory, links, network namespaces."""
    place = shape.place(name)
    found = [str(process) for process in processes(place)]
    found += [str(place.root)] if place.root.exists() else []
    for folder in (Path("/sys/class/net"), Path("/run/netns")):
        found += [str(path) for path in folder.glob(f"{place.bridge}*")]
    return found


def test_a_step_runs_on_every_node_with_its_fake_gpus(mini_cluster: MiniCluster) -> None:
    said = mini_cluster.run(
        *("srun", "--nodes=4", "--gpus-per-node=8", "--exclusive", "--mem=500G"),
        *("bash", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"),
    )
    assert sorted(said.splitlines()) == [f"mn{n} 0,1,2,3,4,5,6,7" for n in (1, 2, 3, 4)]
    shares = mini_cluster.run(
        "srun", "--ntasks=2", "--gpus-per-task=1", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES"
    )
    assert sorted(shares.split()) == ["0", "1"]


def preempt(cluster: MiniCluster, directory: Path) -> str:
    """A job in rollout gives way to one in learner, which ends; the former's id."""
    whole = ("--nodes=1", "--exclusive", f"--nodelist={NODE}")
    low = cluster.sbatch(
        # A job that dies of its own --signal within the grace time is not requeued by Slurm.
        "trap '' USR2; echo start ${SLURM_RESTART_COUNT:-0}; exec sleep 600",
        *(*whole, "--partition=rollout", "--requeue", "--signal=B:USR2@60"),
        cwd=directory,
    )
    output = directory / f"job-{low}.out"
    wait_for(lambda: output.exists() and "start 0" in output.read_text(), within_s=30)
    high = cluster.sbatch("sleep 1", *whole, "--partition=learner", cwd=directory)
    cluster.wait_for_job(high, "COMPLETED")
    return low


def has_restarted(cluster: MiniCluster, job: str, directory: Path) -> bool:
    """With the output of both lives in one file, in their order."""
    lines = (directory / f"job-{job}.out").read_text().splitlines()
    starts = [line for line in lines if line.startswith("start")]
    return cluster.job(job)["Restarts"] == "1" and starts == ["start 0", "start 1"]


def test_preempted_rollout_is_requeued(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster("user", "--nodes=1", "--grace=0", "--no-user-signal")
    job = preempt(cluster, tmp_path)
    wait_for(lambda: has_restarted(cluster, job, tmp_path), within_s=60)


def test_preempted_rollout_is_cancelled_where_slurm_is_told_so(
    make_cluster: MakeCluster, tmp_path: Path
) -> None:
    cluster = make_cluster("user", "--nodes=1", "--grace=0", "--preempt-mode=CANCEL")
    job = preempt(cluster, tmp_path)
    assert cluster.wait_for_job(job, "PREEMPTED")["Restarts"] == "0"


@pytest.mark.full
def test_a_preempted_job_gets_its_own_signal_and_the_grace_time(
    mini_cluster: MiniCluster, tmp_path: Path
) -> None:
    job = preempt(mini_cluster, tmp_path)
    wait_for(lambda: has_restarted(mini_cluster, job, tmp_path), within_s=60)


@pytest.mark.full
def test_a_crashed_node_takes_its_job_along_and_comes_back(
    mini_cluster: MiniCluster, tmp_path: Path
) -> None:
    job = mini_cluster.sbatch("exec sleep 600", "--requeue", cwd=tmp_path)
    node = mini_cluster.wait_for_job(job, "RUNNING")["NodeList"]
    mini_cluster.act("crash", node)
    mini_cluster.act("revive", node)
    wait_for(lambda: mini_cluster.job(job)["Restarts"] == "1", within_s=30)
    mini_cluster.wait_for_job(job, "RUNNING")


def test_jobs_survive_a_dead_controller_and_a_dead_slurmd(
    mini_cluster: MiniCluster, tmp_path: Path
) -> None:
    job = mini_cluster.sbatch("exec sleep 600", cwd=tmp_path)
    node = mini_cluster.wait_for_job(job, "RUNNING")["NodeList"]
    # slurmctld writes its state every few seconds; what is younger, a SIGKILL makes it forget.
    state = mini_cluster.conf.parent / "state" / "job_state"
    mini_cluster.run("scontrol", "update", f"jobid={job}", "comment=seen-running")
    wait_for(lambda: b"seen-running" in state.read_bytes(), within_s=15)
    mini_cluster.act("killd", node)
    mini_cluster.act("killctld")
    mini_cluster.act("startctld")
    mini_cluster.act("startd", node)
    assert mini_cluster.job(job)["JobState"] == "RUNNING"


def test_down_leaves_nothing(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster("user", "--nodes", "2")
    job = cluster.sbatch(f'srun bash -c "{IGNORE_SIGNALS}"', "--nodes=2", cwd=tmp_path)
    cluster.wait_for_job(job, "RUNNING")
    assert len(traces(cluster.name)) > 5
    cluster.stop()
    assert traces(cluster.name) == []
    cluster.stop()


@pytest.mark.parametrize("verb", ["up", "down"])
def test_what_a_killed_cluster_left_is_removed(
    verb: str, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    cluster = make_cluster("user", "--nodes", "2")
    job = cluster.sbatch(f'srun bash -c "{IGNORE_SIGNALS}"', "--nodes=2", cwd=tmp_path)
    cluster.wait_for_job(job, "RUNNING")
    for process in processes(shape.place(cluster.name)):
        if process.command in ("slurmctld", "slurmd", "munged"):
            os.kill(process.pid, signal.SIGKILL)
    before = set(traces(cluster.name))
    assert any("slurmstepd" in line for line in before)
    switches = ("--nodes", "1") if verb == "up" else ()
    assert mini(verb, *switches, name=cluster.name).returncode == 0
    left = set(traces(cluster.name))
    assert not {line for line in left & before if "pid=" in line}
    assert bool(left) == (verb == "up")


def test_up_removes_a_cluster_whose_owner_is_gone(make_cluster: MakeCluster) -> None:
    owner = subprocess.Popen(["sleep", "600"])
    orphan = f"test-{os.getpid()}-orphan"
    words = ("up", "--nodes", "1", "--owner", str(owner.pid))
    try:
        assert mini(*words, name=orphan).returncode == 0
        make_cluster("user", "--nodes", "1")
        assert traces(orphan), "its owner lives"
        owner.kill()
        owner.wait()
        assert mini("down", name=f"test-{os.getpid()}-nobody").returncode == 0
        assert traces(orphan) == []
    finally:
        owner.kill()
        mini("down", name=orphan)


def test_up_twice_does_nothing_and_other_switches_are_refused(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("user", "--nodes", "1")
    before = traces(cluster.name)
    assert mini("up", "--nodes", "1", name=cluster.name).returncode == 0
    assert traces(cluster.name) == before
    other = mini("up", "--nodes", "1", "--no-user-signal", name=cluster.name)
    assert other.returncode == 1
    assert "runs with other switches" in other.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("status",), "there is no mini cluster"),
        (("up", "--nodes", "99"), "--nodes 99: expected 1 to 64"),
        (("up", "--gpu-type", "h 100"), "expected a word, such as h100"),
    ],
)
def test_refusals_are_sentences(words: tuple[str, ...], said: str) -> None:
    need_slurm()
    name = f"test-{os.getpid()}-none"
    refused = mini(*words, name=name)
    assert refused.returncode == 1
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr
    assert traces(name) == []


def test_a_node_of_the_user_form_cannot_be_cut_off(mini_cluster: MiniCluster) -> None:
    refused = mini("cut", "mn1", name=mini_cluster.name)
    assert refused.returncode == 1
    assert "has no network of its own" in refused.stderr
    unknown = mini("crash", "mn9", name=mini_cluster.name)
    assert "there is no node 'mn9'; expected mn1 to mn4" in unknown.stderr


def test_a_daemon_that_does_not_start_is_shown_and_nothing_stays(tmp_path: Path) -> None:
    need_slurm()
    broken = tmp_path / "slurmctld"
    broken.write_text("#!/bin/sh\necho 'fatal: the state is from the future' >&2; exit 1\n")
    broken.chmod(0o755)
    name = f"test-{os.getpid()}-none"
    refused = subprocess.run(
        [sys.executable, "-m", "slurm.mini", "--name", name, "up"],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    assert "slurmctld does not answer. It has ended." in refused.stderr
    assert "slurmctld: fatal: the state is from the future" in refused.stderr
    assert traces(name) == []


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": str(tmp_path)}
    script = (
        "from slurm.mini import daemons, __main__\n"
        "daemons.SBIN = ''\n"
        "raise SystemExit(__main__.main())"
    )
    words = [sys.executable, "-c", script, "up"]
    refused = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "munged is not installed. `make slurm-install`" in refused.stderr


def lose_power(cluster: MiniCluster, job: str, *, told: bool) -> str:
    """Power off the job's node and wait until it runs on another one; the node's name."""
    node = cluster.wait_for_job(job, "RUNNING")["NodeList"]
    cluster.act("crash", node)
    if told:
        words = ("scontrol", "update", f"nodename={node}", "state=down", "reason=no-power")
        cluster.run(*words)
    wait_for(lambda: cluster.job(job)["Restarts"] == "1", within_s=60)
    assert cluster.wait_for_job(job, "RUNNING")["NodeList"] != node
    return node


def test_a_node_loses_power_and_sacct_knows(root_cluster: MiniCluster, tmp_path: Path) -> None:
    seen = root_cluster.run("srun", "--nodes=4", "--label", "bash", "-c", "hostname; hostname -I")
    assert sorted(line.split(": ")[1].strip() for line in seen.splitlines()) == sorted(
        word for n in (1, 2, 3, 4) for word in (f"mn{n}", f"{root_subnet(root_cluster)}.{10 + n}")
    )
    job = root_cluster.sbatch("exec sleep 600", "--requeue", cwd=tmp_path)
    node = lose_power(root_cluster, job, told=True)
    sacct = ("sacct", "--duplicates", "--noheader", "--parsable2", "-X", "--format=State")
    wait_for(
        lambda: root_cluster.run(*sacct, "--jobs", job).split() == ["NODE_FAIL", "RUNNING"],
        within_s=10,
        what=lambda: root_cluster.run(*sacct, "--jobs", job),
    )
    root_cluster.act("revive", node)
    assert len(root_cluster.run("srun", "--nodes=4", "hostname").split()) == 4


def root_subnet(cluster: MiniCluster) -> str:
    record = shape.read_record(shape.place(cluster.name))
    assert record is not None
    assert record.subnet is not None
    return record.subnet


def test_a_node_is_cut_off_the_network_and_mended(
    root_cluster: MiniCluster, tmp_path: Path
) -> None:
    reach = ("exec", "mn1", "bash", "-c")
    address = f"{root_subnet(root_cluster)}.12"
    port = "6000"
    listen = f"python3 -m http.server {port} --bind {address}"
    job = root_cluster.sbatch(f"srun {listen}", "--nodelist=mn2", cwd=tmp_path)
    root_cluster.wait_for_job(job, "RUNNING")
    ask = f"timeout 1 bash -c '</dev/tcp/{address}/{port}' && echo yes || echo no"
    wait_for(lambda: "yes" in root_cluster.act(*reach, ask), within_s=20)
    root_cluster.act("cut", "mn2")
    assert root_cluster.act(*reach, ask).strip() == "no"
    root_cluster.act("mend", "mn2")
    wait_for(lambda: "yes" in root_cluster.act(*reach, ask), within_s=20)
    assert root_cluster.job(job)["JobState"] == "RUNNING"


@pytest.mark.full
def test_slurm_notices_by_itself_that_a_node_is_gone(
    root_cluster: MiniCluster, tmp_path: Path
) -> None:
    job = root_cluster.sbatch("exec sleep 600", "--requeue", cwd=tmp_path)
    root_cluster.act("revive", lose_power(root_cluster, job, told=False))


def test_down_of_the_root_form_leaves_nothing(
    root_cluster: MiniCluster, make_cluster: MakeCluster
) -> None:
    assert root_cluster.form == "root", "the rights are there"
    cluster = make_cluster("root", "--nodes", "2", "--no-accounting")
    assert [line for line in traces(cluster.name) if "/sys/class/net" in line]
    for process in processes(shape.place(cluster.name)):
        with suppress(ProcessLookupError):  # a node's processes go with its first one
            os.kill(process.pid, signal.SIGKILL)
    cluster.stop()
    assert traces(cluster.name) == []


def test_the_root_form_is_refused_without_rights() -> None:
    need_slurm()
    name = f"test-{os.getpid()}-none"
    if os.geteuid():
        refused = mini("up", "--form", "root", "--no-accounting", name=name)
        assert "the root form needs root" in refused.stderr
        return
    without = ["setpriv", "--bounding-set=-sys_admin,-net_admin", "--inh-caps=-all"]
    words = [*without, sys.executable, "-m", "slurm.mini", "--name", name, "up", "--form", "root"]
    refused = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "does not let root make a bridge" in refused.stderr
    assert "FORM=user" in refused.stderr
    assert traces(name) == []


def test_absent_slurm_is_a_skip_or_a_failure_where_it_is_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clusters, "REQUIRED", False)
    with pytest.raises(pytest.skip.Exception, match="srun is not installed"):
        clusters.absent("srun is not installed")
    monkeypatch.setattr(clusters, "REQUIRED", True)
    with pytest.raises(pytest.fail.Exception, match="DAPO_REQUIRE_SLURM=1, but srun"):
        clusters.absent("srun is not installed")
