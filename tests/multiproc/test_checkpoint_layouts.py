"""A checkpoint goes through every layout, bit by bit, and waits for the slowest rank's disk."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
from learner_world import Case, Connected, same, start, update, whole_state

from dapo_hpc.learner.checkpoint import CheckpointNotWritten, Checkpoints, Progress
from dapo_hpc.learner.parallel import BROKEN, Layout, PeerLost

TENSOR, PIPELINE, DATA = Layout(tensor=2), Layout(pipeline=2), Layout(data=2)


def chain(model: str, dtype: str) -> list[Case]:
    """Each learner loads what the one before it saved; the first starts from the model."""
    return [
        Case(model, dtype=dtype),
        Case(model, TENSOR, dtype, distributed=True, sequence_parallel=True),
        Case(model, PIPELINE, dtype),
        Case(model, DATA, dtype, distributed=True),
        Case(model, DATA, dtype),
        Case(model, PIPELINE, dtype, distributed=True),
        Case(model, TENSOR, dtype),
        Case(model, dtype=dtype, distributed=True),
    ]


CHAINS = {"tied": chain("tied", "float32"), "biased": chain("biased", "bfloat16")}
FOUR = [
    Case("tied", dtype="bfloat16"),
    Case("tied", Layout(pipeline=2, data=2), "bfloat16", distributed=True),
    Case("tied", Layout(tensor=2, data=2), "bfloat16", distributed=True, sequence_parallel=True),
    Case("tied", Layout(tensor=2, pipeline=2), "bfloat16", distributed=True),
    Case("tied", Layout(pipeline=2, data=2), "bfloat16"),
    Case("tied", dtype="bfloat16"),
]


def run_chain(cases: list[Case], root: Path, rank: int) -> None:
    for number, case in enumerate(cases):
        with Connected(case.layout, root, rank, f"{case.model}-{number}") as here:
            if here is None:
                continue
            directory = root / case.model / "checkpoints"
            policy, optimizer = case.build(root, here)
            checkpoints = Checkpoints(
                directory / str(number), here, keep=1, is_async=number % 2 > 0
            )
            if number == 0:
                for seed in range(3):
                    update(policy, optimizer, seed)
            else:
                before = Checkpoints(directory / str(number - 1), here, keep=1)
                assert before.load_newest(policy, optimizer) == Progress(step=number, lineage=7)
            assert optimizer.num_updates == 3
            checkpoints.save(policy, optimizer, Progress(step=number + 1, lineage=7))
            loaded = whole_state(policy, optimizer)
            # From here on in the same layout, once from memory and once from the checkpoint.
            update(policy, optimizer, 99)
            went_on = whole_state(policy, optimizer)
            checkpoints.wait()
            again = case.build(root, here)
            checkpoints.load_newest(*again)
            update(*again, 99)
            results = {"loaded": loaded, "went on": went_on, "resumed": whole_state(*again)}
            if rank == 0:
                torch.save(results, directory / f"{number}.pt")


def results(root: Path, model: str, number: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(root / model / "checkpoints" / f"{number}.pt")
    return found


def slow_then_full(root: Path, rank: int) -> None:
    """Rank 1's disk keeps a checkpoint waiting, takes no other, and then rank 1 is restarted."""
    found: dict[str, Any] = {}
    released = threading.Event()
    real = os.fsync

    def slow(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert released.wait(60)
        real(descriptor)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    case = Case("tied", DATA, distributed=True)
    with Connected(case.layout, root, rank, "slow") as here:
        assert here is not None
        trained = case.build(root, here)
        checkpoints = Checkpoints(root / "slow", here, keep=2, is_async=True)
        os.fsync = slow if rank == 1 else real
        checkpoints.save(*trained, Progress(step=1))
        saved = whole_state(*trained)
        for seed in range(3):
            update(*trained, seed)
        found["while slow"] = checkpoints.steps()
        here.barrier()
        released.set()
        checkpoints.wait()
        found["afterwards"] = checkpoints.steps()
        os.fsync = full if rank == 1 else real
        try:
            checkpoints.save(*trained, Progress(step=2))
            checkpoints.wait()
        except CheckpointNotWritten as error:
            found["error"] = str(error)
        released.clear()
        os.fsync = slow if rank == 1 else real
        checkpoints = Checkpoints(root / "lost", here, keep=2, is_async=True)
        checkpoints.save(*trained, Progress(step=1))
        here.barrier()
        again = case.build(root, here)
        if rank == 0:
            here.store.set(BROKEN, "1")  # as rank 1's next life would
            with contextlib.suppress(PeerLost):
                checkpoints.wait()
                found["waited"] = True
        here.barrier()
        released.set()
        with contextlib.suppress(PeerLost):
            checkpoints.wait()
            found["waited"] = True
        os.fsync = real
        found["loaded"] = Checkpoints(root / "slow", here, keep=2).load_newest(*again)
        found["same"] = same(saved, whole_state(*again))
        torch.save(found, root / f"slow-{rank}.pt")


def both_chains(root: Path, rank: int) -> None:
    slow_then_full(root, rank)
    for cases in CHAINS.values():
        run_chain(cases, root, rank)


def chain_of_four(root: Path, rank: int) -> None:
    run_chain(FOUR, root, rank)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chains")
    start(both_chains, root, 2)
    return root


NUMBERED = [(model, number) for model, cases in CHAINS.items() for number in range(len(cases))]


@pytest.mark.parametrize(
    ("model", "number"), NUMBERED, ids=lambda x: x if isinstance(x, str) else None
)
def test_every_layout_loads_what_the_first_saved(model: str, number: int, two_ranks: Path) -> None:
    first, found = results(two_ranks, model, 0), results(two_ranks, model, number)
    assert same(first["loaded"], found["loaded"]), CHAINS[model][number].name
    assert same(found["went on"], found["resumed"]), "it resumes in its own layout as if unbroken"


def test_an_update_makes_a_difference(two_ranks: Path) -> None:
    """Negative control: `same` sees what one update changes, in each kind of tensor."""
    for model in CHAINS:
        found = results(two_ranks, model, 0)
        for kind in ("parameters", "main/0", "exp_avg/0", "exp_avg_sq/0"):
            pair = ({kind: found["loaded"][kind]}, {kind: found["went on"][kind]})
            assert not same(*pair), kind


@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_has_its_name_when_the_slowest_rank_has_written(
    rank: int, two_ranks: Path
) -> None:
    found = torch.load(two_ranks / f"slow-{rank}.pt", weights_only=False)
    assert found["while slow"] == []
    assert found["afterwards"] == [1]
    assert found["loaded"] == Progress(step=1)
    assert found["same"], "what was there when `save` returned, not what three updates made of it"
    assert "checkpoint 2 " in found["error"]
    assert "(rank 1: OSError: [Errno 28] No space left on device)" in found["error"]
    assert "waited" not in found, "nobody waits for a rank that is gone"


@pytest.mark.full
def test_four_ranks(tmp_path: Path) -> None:
    start(chain_of_four, tmp_path, 4)
    first = results(tmp_path, "tied", 0)
    for number, case in enumerate(FOUR):
        found = results(tmp_path, "tied", number)
        assert same(first["loaded"], found["loaded"]), case.name
        assert same(found["went on"], found["resumed"]), case.name
