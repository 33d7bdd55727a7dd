"""A neuron set: the neurons, or the attention heads, of each language, with score and kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neurons.architectures.anatomy import UNITS
from neurons.errors import BrocaError, UsageError
from neurons.files.artifact import Artifact, load_artifact, save_artifact
from neurons.models.source import ModelSource
from neurons.scorers.selection import KINDS, kind_of

# Unit -> the metadata with the number of them in each layer.
_COUNTS = {"neuron": "neuron_counts", "head": "heads"}


@dataclass(frozen=True)
class NeuronSet:
    """Neurons by language, or attention heads: "neuron" then stands for head.

    Attributes:
        members: language -> int64 [n, 2], unique rows (layer, neuron), sorted.
        scores: language -> float64 [n], the method's score of each row of ``members``.
        kinds: language -> int64 [n], each row's index into ``neurons.scorers.selection.KINDS``.
        layers: L of the model.
        neurons: I of the model, those of all experts of a layer together; of heads, A.
        metadata: unit, method, settings, tokens, fingerprint, model, corpus digest, experts; ``neuron_counts`` and ``heads``,
            the numbers of neurons and of heads of each layer.
    """

    members: dict[str, torch.Tensor]
    scores: dict[str, torch.Tensor]
    kinds: dict[str, torch.Tensor]
    layers: int
    neurons: int
    metadata: dict[str, Any]

    @property
    def unit(self) -> str:
        """ "neuron" or "head"."""
        return str(self.metadata.get("unit", "neuron"))

    @property
    def site(self) -> str:
        """The site of the values: "mlp_in", or "attn_in" of heads."""
        return f"{UNITS[self.unit]}_in"

    @property
    def experts(self) -> int:
        """Experts E a layer (1 in a dense model); neuron (expert e, j) is number e * (I / E) + j."""
        return 1 if self.unit == "head" else int(self.metadata.get("experts", 1))

    @property
    def counts(self) -> list[int]:
        """Number of neurons or heads of each layer, 0 where Broca understands none."""
        # Older files hold no numbers of neurons.
        return list(self.metadata.get(_COUNTS[self.unit], [self.neurons] * self.layers))

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.members)

    @property
    def empty_languages(self) -> tuple[str, ...]:
        """Languages without neurons."""
        return tuple(language for language, rows in self.members.items() if len(rows) == 0)

    def of(self, language: str) -> torch.Tensor:
        """Rows (layer, neuron) of a language.

        Raises:
            UsageError: the set does not have the language.
        """
        if language not in self.members:
            raise UsageError(f"the neuron set has no language {language!r}: it has {', '.join(self.members)}")
        return self.members[language]

    def kind_counts(self, language: str) -> dict[str, int]:
        """Number of a language's neurons of each kind."""
        self.of(language)
        counts = torch.bincount(self.kinds[language], minlength=len(KINDS)).tolist()
        return dict(zip(KINDS, counts, strict=True))

    def by_layer(self, language: str) -> list[torch.Tensor]:
        """Neuron indices of a language, int64, one tensor for each layer."""
        rows = self.of(language)
        return [rows[rows[:, 0] == layer, 1] for layer in range(self.layers)]

    def require_model(self, source: ModelSource) -> None:
        """Check that the neurons were identified in this model.

        Raises:
            BrocaError: another fingerprint; a set without a fingerprint passes.
        """
        if "fingerprint" in self.metadata:
            source.require_fingerprint(self.metadata, "the neuron set")

    def require_places(self, source: ModelSource) -> None:
        """Check that the set belongs to the model, also without a fingerprint.

        Raises:
            BrocaError: another fingerprint, or other numbers of layers, neurons or heads.
        """
        self.require_model(source)
        expected = (source.anatomy.layers, source.anatomy.places(self.unit))
        if (self.layers, self.neurons) != expected:
            raise BrocaError(
                f"the neuron set has {self.layers} x {self.neurons} {self.unit}s, but the model has "
                f"{expected[0]} x {expected[1]}: identify {self.unit}s in this model"
            )

    def save(self, path: Path | str) -> None:
        tensors = {f"members.{i}": rows for i, rows in enumerate(self.members.values())}
        tensors |= {f"scores.{i}": self.scores[language] for i, language in enumerate(self.members)}
        tensors |= {f"kinds.{i}": self.kinds[language] for i, language in enumerate(self.members)}
        fields = {"languages": list(self.members), "layers": self.layers, "neurons": self.neurons}
        save_artifact(path, "neurons", tensors, {**self.metadata, **fields})


def neuron_set(
    members: Mapping[str, torch.Tensor],
    scores: Mapping[str, torch.Tensor],
    layers: int,
    neurons: int,
    metadata: Mapping[str, Any],
    kinds: Mapping[str, torch.Tensor] | None = None,
) -> NeuronSet:
    """A NeuronSet with the rows of each language in (layer, neuron) order.

    Args:
        kinds: as the attribute; None derives them from the number of languages in ``members``.

    Raises:
        BrocaError: a neuron that the model does not have or that is named twice; a number of scores or kinds
            other than that of neurons, or a kind that does not exist.
    """
    for language, rows in members.items():
        if len(rows) and not (
            bool((rows >= 0).all()) and int(rows[:, 0].max()) < layers and int(rows[:, 1].max()) < neurons
        ):
            raise BrocaError(f"language {language!r} names a neuron outside {layers} x {neurons}")
        if len(flat_places(rows, neurons).unique()) != len(rows):
            raise BrocaError(f"language {language!r} names a neuron twice")
        for name, values in (("scores", scores), ("kinds", kinds)):
            if values is not None and (language not in values or len(values[language]) != len(rows)):
                held = len(values[language]) if language in values else 0
                raise BrocaError(f"language {language!r} has {len(rows)} neurons, but {held} {name}")
        if kinds is not None and not bool(((kinds[language] >= 0) & (kinds[language] < len(KINDS))).all()):
            raise BrocaError(
                f"language {language!r} has an unknown kind of neuron: known are {', '.join(KINDS)}"
            )
    if kinds is None:
        owners = torch.zeros(layers * neurons, dtype=torch.int64)
        for rows in members.values():
            owners[flat_places(rows, neurons)] += 1
        kinds = {k: kind_of(owners[flat_places(rows, neurons)], len(members)) for k, rows in members.items()}
    order = {k: flat_places(rows, neurons).argsort(stable=True) for k, rows in members.items()}
    return NeuronSet(
        members={k: rows[order[k]].to(torch.int64) for k, rows in members.items()},
        scores={k: scores[k][order[k]].double() for k in members},
        kinds={k: kinds[k][order[k]].to(torch.int64) for k in members},
        layers=layers,
        neurons=neurons,
        metadata=dict(metadata),
    )


def flat_places(rows: torch.Tensor, neurons: int) -> torch.Tensor:
    """The number of each (layer, neuron) in the whole model, int64 [n]."""
    return rows[:, 0] * neurons + rows[:, 1]


def load_neuron_set(path: Path | str) -> NeuronSet:
    """Read a file of ``NeuronSet.save``.

    Raises:
        UsageError, BrocaError: as ``load_artifact`` and ``neuron_set``, or the file is not a neuron set.
    """
    artifact = load_artifact(path, "neurons")
    fault = _fault(artifact)
    if fault is not None:
        raise BrocaError(f"{path}: not a readable neuron set ({fault}): identify it again")
    languages = artifact.metadata["languages"]

    def group(name: str) -> dict[str, torch.Tensor]:
        return {language: artifact.tensors[f"{name}.{i}"] for i, language in enumerate(languages)}

    # Files of Broca 0.1 have no kinds.
    kinds = group("kinds") if all(f"kinds.{i}" in artifact.tensors for i in range(len(languages))) else None
    try:
        return neuron_set(
            group("members"),
            group("scores"),
            artifact.metadata["layers"],
            artifact.metadata["neurons"],
            artifact.metadata,
            kinds,
        )
    except BrocaError as error:
        raise BrocaError(f"{path}: {error}") from error


def _fault(artifact: Artifact) -> str | None:
    """The first fault in a neuron set's metadata or tensors; None without any."""
    metadata, tensors = artifact.metadata, artifact.tensors
    languages = metadata.get("languages")
    if not isinstance(languages, list) or not all(isinstance(language, str) for language in languages):
        return f"its languages are {languages!r}"
    if (unit := metadata.get("unit", "neuron")) not in tuple(UNITS):
        return f"it is of {unit!r}"
    if not isinstance(metadata.get("settings", {}), dict):
        return f"its settings are {metadata['settings']!r}"
    sizes = {name: metadata.get(name) for name in ("layers", "neurons")}
    sizes["experts"] = metadata.get("experts", 1)
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            return f"it has {size!r} {name}"
    counts = metadata.get(_COUNTS[unit])
    if (unit == "head" or counts is not None) and not (
        isinstance(counts, list) and len(counts) == sizes["layers"] and all(type(n) is int for n in counts)
    ):
        return f"its numbers of {unit}s are {counts!r}"
    for i, language in enumerate(languages):
        rows, scores, kinds = (tensors.get(f"{name}.{i}") for name in ("members", "scores", "kinds"))
        if rows is None or rows.ndim != 2 or rows.shape[1] != 2 or rows.dtype != torch.int64:
            return f"it lists no neurons of {language!r}"
        if scores is None or scores.ndim != 1 or not scores.is_floating_point():
            return f"it has no scores of {language!r}"
        if kinds is not None and (kinds.ndim != 1 or kinds.is_floating_point()):
            return f"it has no kinds of {language!r}"
    return None
