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
    """Vectors from source to target, with further inputs of edits.

    Attributes:
        source: language name.
        target: language name.
        vectors: site ("attn_out", "mlp_out", "block_out") -> float64 [L, d], not normalised.
        input_means: site ("attn_in", "mlp_in") -> float64 [L, width], the mean of both languages.
        metadata: method, model, fingerprint, corpus digest, tokens, settings; for some methods ``measures``
            (site -> name -> a number for each layer, such as explained, mass, stability, rank) and ``window``
            (site -> the layers to act in).
        subspaces: site -> float64 [L, d, r], orthonormal columns; columns beyond the rank of a layer are 0,
            so that B B^T is still its projection.  Empty for methods without subspaces.
    """

    source: str
    target: str
    vectors: dict[str, torch.Tensor]
    input_means: dict[str, torch.Tensor]
    metadata: dict[str, Any]
    subspaces: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def provenance(self) -> dict[str, Any]:
        """What the metadata of a plan from this direction say of it."""
        return {
            "source": self.source,
            "target": self.target,
            "languages": [self.source, self.target],
            "direction": {key: self.metadata.get(key) for key in ("method", "corpus", "tokens", "texts")},
        }

    def require_model(self, source: ModelSource) -> None:
        """Check that the direction was estimated on this model.

        Raises:
            BrocaError: another fingerprint; a direction without a fingerprint passes.
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
                f"the direction has no subspace at {site}: make one with `broca direction --method "
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
    """Read a file of ``Direction.save``.

    Raises:
        BrocaError: not a direction, or one with unknown tensors.
    """
    artifact = load_artifact(path, "direction")
    groups: dict[str, dict[str, torch.Tensor]] = {group: {} for group in _GROUPS}
    for name, tensor in artifact.tensors.items():
        group, _, site = name.partition(".")
        if group not in groups:
            raise BrocaError(f"{path}: not a readable direction (unknown tensor {name!r}): make it again")
        groups[group][site] = tensor
    fault = _fault(artifact.metadata, groups)
    if fault is not None:
        raise BrocaError(f"{path}: not a readable direction ({fault}): make it again")
    return Direction(
        source=artifact.metadata["source"],
        target=artifact.metadata["target"],
        metadata=artifact.metadata,
        **groups,
    )


def _fault(metadata: Mapping[str, Any], groups: Mapping[str, Mapping[str, torch.Tensor]]) -> str | None:
    """The first fault in a direction's metadata or tensors; None without any."""
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
        return f"its numbers of layers differ: {', '.join(map(str, sorted(depths)))}"
    return None
