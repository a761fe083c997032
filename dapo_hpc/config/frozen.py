"""Which parameters do not train: the patterns of learner.freeze, given a meaning."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

PARTS = {
    "embedding": "embedding.",
    "output_layer": "output_layer.",
    "final_norm": "decoder.final_layernorm.",
}
"""Pattern -> how Megatron's names of its parameters begin."""
LAYERS = re.compile(r"layers\.(\d+)(?:-(\d+))?")
IN_A_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Frozen:
    """The parameters that learner.freeze names."""

    parts: frozenset[str]
    """Of PARTS."""
    layers: frozenset[int]
    """Numbers from 0, of the whole model."""

    @classmethod
    def of(cls, patterns: Iterable[str]) -> Frozen:
        """Raises ValueError for a pattern that means nothing, with all that would."""
        parts: set[str] = set()
        layers: set[int] = set()
        for pattern in patterns:
            found = LAYERS.fullmatch(pattern)
            if pattern in PARTS:
                parts.add(pattern)
            elif found and int(found[1]) <= int(found[2] or found[1]):
                layers.update(range(int(found[1]), int(found[2] or found[1]) + 1))
            else:
                raise ValueError(
                    f'learner.freeze has "{pattern}"; expected {", ".join(PARTS)}, layers.N or '
                    "layers.FIRST-LAST."
                )
        return cls(frozenset(parts), frozenset(layers))

    def holds(self, name: str, *, first_layer: int, is_tied: bool) -> bool:
        """Whether a parameter is frozen.

        Args:
            name: Megatron's, as in GPTModel.named_parameters() of one pipeline stage.
            first_layer: global number of the stage's layer 0.
            is_tied: the output layer is the embedding, or a copy of it, and frozen with it.
        """
        layer = IN_A_LAYER.match(name)
        if layer:
            return int(layer[1]) + first_layer in self.layers
        if is_tied and name.startswith(PARTS["output_layer"]):
            return "embedding" in self.parts
        return any(name.startswith(PARTS[part]) for part in self.parts)

    def problems(self, *, num_layers: int, is_tied: bool) -> list[str]:
        """What makes no sense for a model of so many layers, tied embeddings or not."""
        found = []
        beyond = sorted(layer for layer in self.layers if layer >= num_layers)
        if beyond:
            found.append(
                f"learner.freeze names layer {beyond[0]}, but the model has {num_layers} layers, 0 "
                f"to {num_layers - 1}."
            )
        if is_tied and "output_layer" in self.parts:
            found.append(
                'learner.freeze names "output_layer", but the output layer of this model is its '
                'embedding (tie_word_embeddings). Name "embedding", which freezes both, or nothing.'
            )
        own = set(PARTS) - ({"output_layer"} if is_tied else set())
        if own <= self.parts and len(self.layers) >= num_layers:
            found.append("learner.freeze names every parameter, so nothing would train.")
        return found
