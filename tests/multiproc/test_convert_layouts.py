"""Conversion against real parallel ranks: what they write is exported by one process, what one
process imports they load, each its own pieces."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader

from dapo_hpc.learner import convert
from dapo_hpc.learner.checkpoint import Checkpoints, Progress
from dapo_hpc.learner.convert import export_checkpoint, import_model
from dapo_hpc.learner.model import Policy
from dapo_hpc.learner.parallel import Layout, Processes, connect, disconnect
from dapo_hpc.learner.start import load_imported
from dapo_hpc.weights.source import SafetensorsSource
from tests.learner_parts import make_model
from tests.unit.learner.test_checkpoint import build, disturb

pytestmark = pytest.mark.full


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    layout: Layout


MODELS = {"tied": ("qwen3", True), "biased": ("qwen2", False)}
CASES = [
    Case("tensor", "biased", Layout(tensor=2)),  # the vocabulary of 33 is padded
    Case("pipeline", "tied", Layout(pipeline=2)),  # the embedding is on both stages
    Case("tensor-pipeline", "tied", Layout(tensor=2, pipeline=2)),
]
WORLD = 4
HIDDEN = 32
WHOLE = "-whole"
"""Ending of the import whose matrices are in one piece each, for the negative control."""


def worker(rank: int, root: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    for case in CASES:
        if rank < case.layout.world:
            here = connect(case.layout, rank, Path(root) / f"{case.name}.json")
            write_as_learner(case, here, Path(root))
            for ending in ("", WHOLE):
                read_import(case, here, Path(root), ending)
            here.barrier()
            disconnect()


def write_as_learner(case: Case, here: Processes, root: Path) -> None:
    """A checkpoint after an update, and what the learner itself exports then."""
    policy, optimizer = build(root / case.model, here)
    disturb(policy, optimizer, seed=here.rank)
    Checkpoints(root / case.name, here, keep=1).save(policy, optimizer, Progress(step=1))
    exported = {name: tensor.clone() for name, tensor in policy.export()}
    if here.rank == 0:
        save_file(exported, root / f"{case.name}.safetensors")


def read_import(case: Case, here: Processes, root: Path, ending: str) -> None:
    """A start from the import; the result is what the Hugging Face files hold."""
    policy = Policy(root / case.model, here, dtype=torch.float32, temperature=1.0)
    unneeded: list[int] = []
    with counting(unneeded):
        load_imported(policy, root / f"{case.model}-imported{ending}")
    found = [p.detach().clone() for p in policy.module.parameters()]
    policy.load(SafetensorsSource(root / case.model))
    is_equal = all(
        torch.equal(a, b) for a, b in zip(found, policy.module.parameters(), strict=True)
    )
    result = {"is_equal": is_equal, "reads": len(unneeded), "unneeded": sum(unneeded)}
    (root / f"{case.name}{ending}-{here.rank}.result").write_text(json.dumps(result))


@contextmanager
def counting(unneeded: list[int]) -> Iterator[None]:
    """Note for each piece that is read how many of its numbers nobody asked for."""
    read = FileSystemReader.read_data

    def read_data(reader: Any, plan: Any, planner: Any) -> Any:
        for item in plan.items:
            stored = planner.metadata.state_dict_metadata[item.storage_index.fqn]
            sizes = {chunk.offsets: chunk.sizes for chunk in getattr(stored, "chunks", [])}
            piece = sizes.get(item.storage_index.offset, item.lengths)
            unneeded.append(piece.numel() - item.lengths.numel())
        return read(reader, plan, planner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemReader, "read_data", read_data)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("convert")
    for name, (family, tied) in MODELS.items():
        make_model(directory / name, family, tied=tied)
        import_model(directory / name, directory / f"{name}-imported")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(convert, "MAX_PIECES", 1)
            import_model(directory / name, directory / f"{name}-imported{WHOLE}")
    mp.spawn(worker, args=(str(directory),), nprocs=WORLD)
    return directory


def results(root: Path, case: Case, ending: str = "") -> list[dict[str, Any]]:
    ranks = range(case.layout.world)
    return [json.loads((root / f"{case.name}{ending}-{rank}.result").read_text()) for rank in ranks]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_process_exports_what_all_ranks_wrote(case: Case, root: Path) -> None:
    target = root / f"{case.name}-exported"
    export_checkpoint(root / case.name / "step_000001", target, model=root / case.model)
    found = load_file(target / "model.safetensors")
    expected = load_file(root / f"{case.name}.safetensors")
    start = load_file(root / case.model / "model.safetensors")
    assert found.keys() == expected.keys() == start.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not any(torch.equal(found[name], start[name]) for name in found), "it was trained"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_rank_loads_an_import_and_reads_its_own_pieces_only(case: Case, root: Path) -> None:
    # 33 rows of vocabulary are two pieces of 17; one rank without a partner cuts the last row off.
    padding = HIDDEN if case.layout.tensor == 1 else 0
    for result in results(root, case):
        assert result["is_equal"]
        assert result["reads"] > 0
        assert result["unneeded"] == padding


def test_an_import_in_whole_matrices_is_read_in_parts(root: Path) -> None:
    """Negative control: without pieces, tensor-parallel ranks read more than they need."""
    stored = load_file(root / CASES[0].model / "model.safetensors")
    for result in results(root, CASES[0], WHOLE):
        assert result["is_equal"]
        assert result["unneeded"] > 0.45 * sum(tensor.numel() for tensor in stored.values())
