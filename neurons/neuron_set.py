"""A neuron set: which neurons belong to which language, and with what score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neurons.artifact import load_artifact, save_artifact
from neurons.errors import BrocaError, UsageError
from neurons.source import ModelSource


@dataclass(frozen=True)
class NeuronSet:
    """Neurons by language.

    Attributes:
        members: language -> int64 [n, 2], rows (layer, neuron) in that order, unique.
        scores: language -> float64 [n], the method's score of each row of ``members``.
        layers: L of the model.
        neurons: I of the model.
        metadata: method, settings, tokens, fingerprint, model, corpus digest.
    """

    members: dict[str, torch.Tensor]
    scores: dict[str, torch.Tensor]
    layers: int
    neurons: int
    metadata: dict[str, Any]

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.members)

    @property
    def empty_languages(self) -> tuple[str, ...]:
        """Languages for which the method found no neuron."""
        return tuple(language for language, rows in self.members.items() if len(rows) == 0)

    def of(self, language: str) -> torch.Tensor:
        """Rows (layer, neuron) of a language.

        Raises:
            UsageError: the set does not know the language.
        """
        if language not in self.members:
            raise UsageError(f"the neuron set has no language {language!r}: it has {', '.join(self.members)}")
        return self.members[language]

    def by_layer(self, language: str) -> list[torch.Tensor]:
        """Neuron indices of a language, int64, one tensor a layer."""
        rows = self.of(language)
        return [rows[rows[:, 0] == layer, 1] for layer in range(self.layers)]

    def require_model(self, source: ModelSource) -> None:
        """Refuse a model that the neurons were not found in.

        Raises:
            BrocaError: another fingerprint; a set that names none passes.
        """
        if "fingerprint" in self.metadata:
            source.require_fingerprint(self.metadata, "the neuron set")

    def save(self, path: Path) -> None:
        tensors = {f"members.{i}": rows for i, rows in enumerate(self.members.values())}
        tensors |= {f"scores.{i}": values for i, values in enumerate(self.scores.values())}
        fields = {"languages": list(self.members), "layers": self.layers, "neurons": self.neurons}
        save_artifact(path, "neurons", tensors, {**self.metadata, **fields})


def neuron_set(
    members: Mapping[str, torch.Tensor],
    scores: Mapping[str, torch.Tensor],
    layers: int,
    neurons: int,
    metadata: Mapping[str, Any],
) -> NeuronSet:
    """A NeuronSet with the rows of each language in (layer, neuron) order.

    Raises:
        BrocaError: a neuron that the model does not have, or one named twice.
    """
    ordered, ordered_scores = {}, {}
    for language, rows in members.items():
        if len(rows) and not (
            bool((rows >= 0).all()) and int(rows[:, 0].max()) < layers and int(rows[:, 1].max()) < neurons
        ):
            raise BrocaError(f"language {language!r} names a neuron outside {layers} x {neurons}")
        flat = rows[:, 0] * neurons + rows[:, 1]
        if len(flat.unique()) != len(flat):
            raise BrocaError(f"language {language!r} names a neuron twice")
        order = flat.argsort(stable=True)
        ordered[language] = rows[order].to(torch.int64)
        ordered_scores[language] = scores[language][order].double()
    return NeuronSet(ordered, ordered_scores, layers, neurons, dict(metadata))


def load_neuron_set(path: Path) -> NeuronSet:
    """Read what ``NeuronSet.save`` wrote."""
    artifact = load_artifact(path, "neurons")
    languages = artifact.metadata["languages"]
    return neuron_set(
        {language: artifact.tensors[f"members.{i}"] for i, language in enumerate(languages)},
        {language: artifact.tensors[f"scores.{i}"] for i, language in enumerate(languages)},
        artifact.metadata["layers"],
        artifact.metadata["neurons"],
        artifact.metadata,
    )
