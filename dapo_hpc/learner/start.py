"""The weights that training starts from: a Hugging Face directory, or an import of it.

Both give the same bits. Of an imported directory each rank reads contiguous pieces of its own; in
safetensors the columns of a matrix lie apart.
"""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from dapo_hpc.config import ModelSection
from dapo_hpc.learner import checkpoint_files, cpu
from dapo_hpc.learner.checkpoint import MAX_CAUSE, UNREADABLE
from dapo_hpc.learner.checkpoint_state import fill, sharded_parameters
from dapo_hpc.learner.model import Policy
from dapo_hpc.weights import families
from dapo_hpc.weights.names import ModelShape
from dapo_hpc.weights.source import SafetensorsSource


def load_start(policy: Policy, model: ModelSection) -> None:
    """Fill the policy with the weights of model.imported, or else of model.path. Collective.

    Raises ValueError when they are damaged or of another model.
    """
    if model.imported is None:
        policy.load(SafetensorsSource(Path(model.path)))
    else:
        load_imported(policy, Path(model.imported))


@torch.no_grad()
def load_imported(policy: Policy, directory: Path) -> None:
    """Fill the policy with the weights of an imported directory; its digests are compared first."""
    found = ModelShape.of(families.read_config(directory))
    if found != policy.shape:
        raise ValueError(
            f"model.imported = {str(directory)!r} is of another model than model.path: {found}, "
            f"expected {policy.shape}. Import the directory of model.path again."
        )
    here = policy.processes
    problem = checkpoint_files.damage(directory, here.rank, here.world)
    if here.agree(problem is not None):
        raise ValueError(
            f"model.imported = {str(directory)!r} is damaged: "
            f"{problem or 'another rank found it so'}. Import the model again."
        )
    for parameter in policy.module.parameters():
        parameter.zero_()  # as rows that fill the vocabulary up are, which no file holds
    try:
        with cpu.cuda_calls_on_cpu():
            state = {"model": sharded_parameters(policy.module)}
            loaded = dist_checkpointing.load(state, str(directory))
    except UNREADABLE as error:
        raise ValueError(
            f"model.imported = {str(directory)!r} cannot be loaded: {type(error).__name__}: "
            f"{str(error)[:MAX_CAUSE]}. Import the model again."
        ) from None
    fill(policy.module, loaded["model"])
