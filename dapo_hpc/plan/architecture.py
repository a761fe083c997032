"""The sizes of a model, from its config.json: no weights are read, and no torch is imported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dapo_hpc.config import RunConfig
from dapo_hpc.weights import families
from dapo_hpc.weights.families import FAMILIES, Family

Q_NORM = "self_attention.q_layernorm.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A dense decoder."""

    name: str
    file: str
    """The config.json that was read."""
    model_type: str
    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    is_tied: bool
    """The output layer uses the embedding's weight."""
    max_positions: int | None

    @classmethod
    def read(cls, directory: Path) -> Architecture:
        """Raises ValueError for a model that the learner does not train, or a missing size."""
        file = directory / "config.json"
        try:
            table = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} cannot be read ({error}). Copy it again.") from None
        if table.get("model_type") not in FAMILIES:
            raise ValueError(
                f"{file}: model_type is {table.get('model_type')}; the learner trains "
                f"{', '.join(FAMILIES)}."
            )
        heads, hidden = (
            _size(table, name, file) for name in ("num_attention_heads", "hidden_size")
        )
        found = cls(
            name=directory.name,
            file=str(file),
            model_type=table["model_type"],
            num_layers=_size(table, "num_hidden_layers", file),
            hidden=hidden,
            heads=heads,
            kv_heads=table.get("num_key_value_heads") or heads,
            head_dim=table.get("head_dim") or hidden // heads,
            ffn=_size(table, "intermediate_size", file),
            vocab=_size(table, "vocab_size", file),
            is_tied=bool(table.get("tie_word_embeddings", False)),
            max_positions=table.get("max_position_embeddings"),
        )
        _check_computed(file, {**table, "num_key_value_heads": found.kv_heads})
        return found

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def has_qk_norm(self) -> bool:
        return Q_NORM in self.family.layer

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Rows of the embedding in the learner: the next multiple of the ranks."""
        return -(-self.vocab // tensor_parallel) * tensor_parallel


def find(config: RunConfig, beside: Path) -> Architecture | None:
    """The architecture of model.path; None where no config.json is found.

    Looked for in model.path; in the same path beside the TOML file, where architectures can lie
    whose weights are somewhere else; and in sft.init, from which `dapo sft` makes model.path.
    """
    places = [Path(config.model.path), beside / config.model.path]
    if config.sft is not None:
        places += [Path(config.sft.init), beside / config.sft.init]
    for place in places:
        if (place / "config.json").exists():
            return Architecture.read(place)
    return None


def _size(table: dict[str, Any], name: str, file: Path) -> int:
    value = table.get(name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{file}: {name} is {value}; expected a positive number.")
    return value


def _check_computed(file: Path, table: dict[str, Any]) -> None:
    """Ask the table of families what the learner would refuse about this config."""
    scaling = table.get("rope_scaling") or {}
    rope = {"rope_type": scaling.get("rope_type", scaling.get("type", "default")), **scaling}
    found = families.problems(SimpleNamespace(**{"rope_parameters": rope, **table}))
    if found:
        raise ValueError(f"{file}: {'; '.join(found)}.")
