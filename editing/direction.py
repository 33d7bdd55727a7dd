"""A direction: for each layer and site, the vector from a source language to a target language."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neurons.artifact import load_artifact, save_artifact
from neurons.source import ModelSource


@dataclass(frozen=True)
class Direction:
    """Vectors from source to target, and what edits need to know beside them.

    Attributes:
        source: language name.
        target: language name.
        vectors: site ("attn_out", "mlp_out", "block_out") -> float64 [L, d], not normalised.
        input_means: site ("attn_in", "mlp_in") -> float64 [L, width], the mean of both languages.
        metadata: method, model, fingerprint, corpus digest, tokens.
    """

    source: str
    target: str
    vectors: dict[str, torch.Tensor]
    input_means: dict[str, torch.Tensor]
    metadata: dict[str, Any]

    def require_model(self, source: ModelSource) -> None:
        """Refuse a model that the direction was not taken from.

        Raises:
            BrocaError: another fingerprint; a direction that names none passes.
        """
        if "fingerprint" in self.metadata:
            source.require_fingerprint(self.metadata, "the direction")

    def save(self, path: Path) -> None:
        tensors = {f"vectors.{site}": value for site, value in self.vectors.items()}
        tensors |= {f"input_means.{site}": value for site, value in self.input_means.items()}
        fields = {"source": self.source, "target": self.target, "languages": [self.source, self.target]}
        save_artifact(path, "direction", tensors, {**self.metadata, **fields})


def load_direction(path: Path) -> Direction:
    """Read what ``Direction.save`` wrote."""
    artifact = load_artifact(path, "direction")
    groups: dict[str, dict[str, torch.Tensor]] = {"vectors": {}, "input_means": {}}
    for name, tensor in artifact.tensors.items():
        group, _, site = name.partition(".")
        groups[group][site] = tensor
    return Direction(
        source=artifact.metadata["source"],
        target=artifact.metadata["target"],
        vectors=groups["vectors"],
        input_means=groups["input_means"],
        metadata=artifact.metadata,
    )
