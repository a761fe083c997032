"""Real Slurm clusters on this machine. Skipped where Slurm is absent, see clusters.need_slurm."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fault.conftest import SFT_BATCHES, make_base
from tests.slurm.clusters import MiniCluster, absent, mini, need_slurm

MakeCluster = Callable[..., MiniCluster]

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def user_cluster_of_session() -> Iterator[MiniCluster]:
    """Four nodes of the user form, shared by all tests; see `mini_cluster`."""
    need_slurm()
    cluster = MiniCluster.start(f"test-{os.getpid()}", "user")
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def root_cluster_of_session() -> Iterator[MiniCluster]:
    """Four nodes of the root form with accounting, shared by all tests; see `root_cluster`.

    Missing rights are a skip even where Slurm is required: no installation brings them.
    """
    need_slurm()
    name = f"test-{os.getpid()}-root"
    if os.geteuid():
        pytest.skip("the root form of the mini cluster needs root")
    trial = mini("up", "--form", "root", "--owner", str(os.getpid()), name=name)
    if "does not let root" in trial.stderr:
        pytest.skip(trial.stderr.strip())
    if "is not installed" in trial.stderr:
        absent(trial.stderr.strip())
    cluster = MiniCluster.start(name, "root")
    yield cluster
    cluster.stop()


@pytest.fixture
def mini_cluster(
    user_cluster_of_session: MiniCluster, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MiniCluster]:
    """Four idle nodes of the user form; SLURM_CONF points to them; the test's jobs end with it."""
    _enter(user_cluster_of_session, monkeypatch)
    yield user_cluster_of_session
    user_cluster_of_session.cancel_everything()


@pytest.fixture
def root_cluster(
    root_cluster_of_session: MiniCluster, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MiniCluster]:
    """Four idle nodes of the root form, with sacct; otherwise as `mini_cluster`."""
    _enter(root_cluster_of_session, monkeypatch)
    yield root_cluster_of_session
    root_cluster_of_session.cancel_everything()


@pytest.fixture
def make_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeCluster]:
    """make_cluster("user", "--nodes", "2"): a cluster of one's own, gone after the test."""
    need_slurm()
    made: list[MiniCluster] = []

    def make(form: str, *switches: str) -> MiniCluster:
        cluster = MiniCluster.start(f"test-{os.getpid()}-{len(made)}", form, *switches)
        made.append(cluster)
        _enter(cluster, monkeypatch)
        return cluster

    yield make
    for cluster in made:
        cluster.stop()


def _enter(cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own process, and what it starts, sees this cluster and no job around it."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that guesses digits."""
    return make_base(tmp_path_factory.mktemp("base"), sft_batches=SFT_BATCHES)


@pytest.fixture(scope="session")
def demo_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's own base model."""
    return make_base(tmp_path_factory.mktemp("demo_base"), sft_batches=None)
