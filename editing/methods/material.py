"""What edits and hooks are made from: a model, text and what was computed from it, each part when it is first needed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from editing.directions.diffmean import diffmean_direction
from editing.directions.direction import Direction
from editing.directions.estimation import direction_of
from neurons.errors import BrocaError, UsageError
from neurons.models.source import LoadedModel, ModelSource, load_model, open_model
from neurons.neuron_sets.identify import identify
from neurons.neuron_sets.neuron_set import NeuronSet
from neurons.recording.text_pass import Progress
from neurons.statistics.statistics import Statistics
from neurons.text.corpus import Corpus


@dataclass
class Material:
    """The input of every method; what a method does not use is None or empty.

    Attributes:
        model: hub id, directory or loaded model.
        corpus: text.
        source, target: languages of a study, from which direction, neurons and statistics are computed where they
            are not given; None: they are given.
        device, dtype: of a model that is still to be loaded.
        directions: of this model.
        vector: steering vectors of another library.
        neurons: restricts the edit, or says what it scales.
        statistics: of a recording.
        languages: whose neurons; None takes all of the set.
        layers: that may change; None is the method's default.
        blocks: of "attn" and "mlp"; None is the method's default.
        progress: called with the number of tokens done.
    """

    model: str | LoadedModel
    corpus: Corpus | None = None
    source: str | None = None
    target: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    directions: tuple[Direction, ...] = ()
    vector: Path | None = None
    neurons: NeuronSet | None = None
    statistics: Statistics | None = None
    languages: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    blocks: tuple[str, ...] | None = None
    progress: Progress | None = None
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def loaded(self) -> LoadedModel:
        return load_model(self.model, self.device, self.dtype) if isinstance(self.model, str) else self.model

    @cached_property
    def opened(self) -> ModelSource:
        """The model's config and weights on disk, which suffice for methods that do not run it."""
        return open_model(self.model) if isinstance(self.model, str) else self.model

    @property
    def studied(self) -> bool:
        """Whether several settings will be tried, so that what only the strength scales is solved once for all."""
        return self.source is not None

    @property
    def pair(self) -> tuple[str, str]:
        """(source, target) of a study.

        Raises:
            UsageError: there is none.
        """
        if self.source is None or self.target is None:
            raise UsageError("name the source and the target language")
        return self.source, self.target

    @property
    def text(self) -> Corpus:
        """The corpus.

        Raises:
            UsageError: there is none.
        """
        if self.corpus is None:
            raise UsageError("give text (--corpus)")
        return self.corpus

    @cached_property
    def direction(self) -> Direction:
        """The one that was given, or a study's DiffMean.

        Raises:
            UsageError: none was given, or several.
        """
        if self.studied and not self.directions:
            return diffmean_direction(self.loaded, self.text, *self.pair, self.progress)
        if len(self.directions) != 1:
            raise UsageError(f"give one --direction (there are {len(self.directions)})")
        return self.directions[0]

    @cached_property
    def subspace(self) -> Direction:
        """A study's language subspace."""
        return direction_of(self.loaded, self.text, *self.pair, "language-subspace")

    @property
    def neuron_set(self) -> NeuronSet:
        """The neurons that were given.

        Raises:
            UsageError: there are none.
        """
        if self.neurons is None:
            raise UsageError("give --neurons (from `broca identify`)")
        return self.neurons

    def identified(self, method: str) -> NeuronSet:
        """The neurons that a method of ``broca identify`` finds in the text."""
        found: NeuronSet = self.once(("neurons", method), lambda: identify(self.loaded, self.text, method))
        return found

    def mask(self, method: str, language: str) -> torch.Tensor:
        """bool [L, I], the language's neurons by a method of ``broca identify``.

        Raises:
            BrocaError: it has none.
        """
        neurons = self.identified(method)
        rows = neurons.of(language)
        if not len(rows):
            raise BrocaError(f"{method} finds no neuron for {language} in this model")
        mask = torch.zeros(neurons.layers, neurons.neurons, dtype=torch.bool)
        mask[rows[:, 0], rows[:, 1]] = True
        return mask

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` returned when the key was first used."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]
