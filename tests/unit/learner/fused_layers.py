"""The process of test_fused_layers: models of plain and of fused layers, side by side.

Megatron looks for TransformerEngine when it is imported, so the stand-in is installed first, and
nothing at the top of this file imports Megatron.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dapo_hpc.weights import names

MODELS = {"qwen2": False, "qwen3": True, "llama": False}
"""Family -> whether its output layer is tied."""
LENGTHS = (5, 1, 9, 3)


def tokens() -> Tensor:
    return torch.randint(3, 33, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


def main(root: Path) -> None:
    from tests.unit.learner import transformer_engine_stand_in

    transformer_engine_stand_in.install()
    from dapo_hpc.learner.convert import import_model
    from dapo_hpc.learner.parallel import Layout, connect
    from tests.learner_parts import make_model

    for family, tied in MODELS.items():
        make_model(root / family, family, tied=tied)
        import_model(root / family, root / f"{family}-imported")
    here = connect(Layout(), 0, None)
    found = {family: of_family(root, family, here) for family in MODELS}
    torch.save(found, root / "found.pt")


def of_family(root: Path, family: str, here: Any) -> dict[str, Any]:
    from dapo_hpc.learner.start import load_imported

    found: dict[str, Any] = {}
    for kind in ("plain", "fused"):
        policy = build(root / family, here, kind)[0]
        found[kind] = {"names": [name for name, _ in policy.module.named_parameters()]}
        found[kind] |= passes(policy)
        found[kind]["exported"] = {name: tensor.clone() for name, tensor in policy.export()}
        imported = build(root / family, here, kind)[0]
        load_imported(imported, root / f"{family}-imported")
        found[kind]["imported"] = by_plain_name(imported.module.named_parameters())
    for first, second in (("plain", "fused"), ("fused", "plain"), ("fused", "fused")):
        pair = handed_over(root / f"{family}-{first}-{second}", root / family, here, first, second)
        found[f"{first} to {second}"] = pair
    return found


def build(model: Path, here: Any, kind: str) -> Any:
    from dapo_hpc.learner import spec
    from tests.unit.learner import test_checkpoint

    spec.uses_transformer_engine = lambda *_: kind == "fused"  # type: ignore[assignment]
    return test_checkpoint.build(model, here)


def passes(policy: Any) -> dict[str, Any]:
    """Log-probs, and every gradient of their sum."""
    import numpy as np

    from dapo_hpc.learner.forward import forward_backward, log_probs, row

    ids = tokens().numpy()
    packed = row(policy, ids, np.roll(ids, -1), np.array(LENGTHS))
    ((logprobs, _),) = log_probs(policy, [packed])
    policy.ddp.zero_grad_buffer()
    forward_backward(policy, [packed], lambda _n, found, _e: (found.sum(), None))
    grads = {name: p.main_grad for name, p in policy.module.named_parameters()}
    return {"logprobs": logprobs, "grads": by_plain_name(grads.items())}


def by_plain_name(pairs: Any) -> dict[str, Tensor]:
    return {names.plain_name(name): tensor.detach().clone() for name, tensor in pairs}


def handed_over(directory: Path, model: Path, here: Any, first: str, second: str) -> Any:
    """What one kind of layers saves, and what the other kind holds after loading it."""
    from dapo_hpc.learner.checkpoint import Checkpoints, Progress
    from tests.unit.learner.test_checkpoint import disturb

    saved = build(model, here, first)
    disturb(*saved, 3)
    checkpoints = Checkpoints(directory, here, keep=1)
    checkpoints.save(*saved, Progress(step=1))
    loaded = build(model, here, second)
    assert checkpoints.load_newest(*loaded) == Progress(step=1)
    return [contents(*trained) for trained in (saved, loaded)]


def contents(policy: Any, optimizer: Any) -> dict[str, Tensor]:
    moments = {
        f"{names.plain_name(shard.name)}/{moment}": value.clone()
        for shard in optimizer.shards
        for moment, value in shard.moments.items()
    }
    return by_plain_name(policy.module.named_parameters()) | moments
