"""A direction: for each layer and site, the vector from a source language to a target language."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from neurons.errors import BrocaError
from neurons.files.artifact import load_artifact, save_artifact
from neurons.models.source import ModelSource

_GROUPS = ("vectors", "input_means", "subspaces")


@dataclass(frozen=True)
class Direction:
    """Vectors from source to target, and what edits need to know beside them.

    Attributes:
        source: language name.
        target: language name.
        vectors: site ("attn_out", "mlp_out", "block_out") -> float64 [L, d], not normalised.
        input_means: site ("attn_in", "mlp_in") -> float64 [L, width], the mean of both languages.
        metadata: method, model, fingerprint, corpus digest, tokens, settings; where the method has them,
            ``measures`` (site -> name -> a number a layer, such as explained, mass, stability, rank) and
            ``window`` (site -> the layers to act in).
        subspaces: site -> float64 [L, d, r], orthonormal columns; those past a layer's own rank are 0, so
            that B B^T is the layer's projection all the same.  Empty where the method has none.
    """

    source: str
    target: str
    vectors: dict[str, torch.Tensor]
    input_means: dict[str, torch.Tensor]
    metadata: dict[str, Any]
    subspaces: dict[str, torch.Tensor] = field(default_factory=dict)

    def require_model(self, source: ModelSource) -> None:
        """Refuse a model that the direction was not taken from.

        Raises:
            BrocaError: another fingerprint; a direction that names none passes.
        """
        if "fingerprint" in self.metadata:
            source.require_fingerprint(self.metadata, "the direction")

    def subspace(self, site: str, layer: int) -> torch.Tensor:
        """The subspace's basis at a site of a layer, float64 [d, rank of the layer].

        Raises:
            BrocaError: the direction has no subspace there.
        """
        if site not in self.subspaces:
            raise BrocaError(
                f"the direction has no subspace at {site}: take one with `broca direction --method "
                "low-rank-shift` or language-subspace"
            )
        basis = self.subspaces[site][layer]
        return basis[:, basis.any(0)]

    def save(self, path: Path | str) -> None:
        groups = {name: getattr(self, name) for name in _GROUPS}
        tensors = {
            f"{group}.{site}": value for group, values in groups.items() for site, value in values.items()
        }
        fields = {"source": self.source, "target": self.target, "languages": [self.source, self.target]}
        save_artifact(path, "direction", tensors, {**self.metadata, **fields})


def load_direction(path: Path | str) -> Direction:
    """Read what ``Direction.save`` wrote.

    Raises:
        BrocaError: no direction, or one that holds something that a direction has not.
    """
    artifact = load_artifact(path, "direction")
    groups: dict[str, dict[str, torch.Tensor]] = {group: {} for group in _GROUPS}
    for name, tensor in artifact.tensors.items():
        group, _, site = name.partition(".")
        if group not in groups:
            raise BrocaError(f"{path}: not a readable direction (what is {name!r}?): take it again")
        groups[group][site] = tensor
    fault = _fault(artifact.metadata, groups)
    if fault is not None:
        raise BrocaError(f"{path}: not a readable direction ({fault}): take it again")
    return Direction(
        source=artifact.metadata["source"],
        target=artifact.metadata["target"],
        metadata=artifact.metadata,
        **groups,
    )


def _fault(metadata: Mapping[str, Any], groups: Mapping[str, Mapping[str, torch.Tensor]]) -> str | None:
    """What is wrong with a direction's metadata or tensors; None where nothing is."""
    for name in ("source", "target"):
        if not isinstance(metadata.get(name), str):
            return f"its {name} is {metadata.get(name)!r}"
    if not isinstance(metadata.get("settings", {}), dict):
        return f"its settings are {metadata['settings']!r}"
    depths = set()
    for group, values in groups.items():
        for site, tensor in values.items():
            if tensor.ndim != (3 if group == "subspaces" else 2) or not tensor.is_floating_point():
                return f"{group} at {site} are {tensor.dtype} of shape {list(tensor.shape)}"
            depths.add(len(tensor))
    if len(depths) > 1:
        return f"it is of {' and of '.join(map(str, sorted(depths)))} layers"
    return None
