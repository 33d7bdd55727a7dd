"""The input of methods: a model, text and what is computed from them on first use."""

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
    """The input of every method; parts that a method does not use are None or empty.

    Attributes:
        model: hub id, directory or loaded model.
        corpus: text.
        source, target: languages of a study, which computes missing directions, neurons and statistics itself; None:
            no study, all inputs are given.
        device, dtype: used to load the model.
        directions: directions of this model.
        vector: file of steering vectors from another library.
        neurons: neurons to which the edit is restricted, or which it scales.
        statistics: a recording.
        languages: languages of the neuron set to use; None takes all.
        layers: layers that may change; None: the method's default.
        blocks: "attn" and "mlp", or one of them; None: the method's default.
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
        """The model's config and weights on disk, for methods that do not run it."""
        return open_model(self.model) if isinstance(self.model, str) else self.model

    @property
    def studied(self) -> bool:
        """Whether a study tries several settings, so that a plan which scales with the strength is computed once."""
        return self.source is not None

    @property
    def pair(self) -> tuple[str, str]:
        """(source, target): of a study, else the first two of ``languages``.

        Raises:
            UsageError: they are not given.
        """
        if self.source is not None and self.target is not None:
            return self.source, self.target
        named = (self.languages or ())[:2]
        if len(set(named)) < 2:
            raise UsageError("name the source and the target language (--languages SOURCE,TARGET)")
        return named[0], named[1]

    @property
    def text(self) -> Corpus:
        """The corpus.

        Raises:
            UsageError: it is not given.
        """
        if self.corpus is None:
            raise UsageError("give text (--corpus)")
        return self.corpus

    @cached_property
    def direction(self) -> Direction:
        """The given direction, or DiffMean in a study.

        Raises:
            UsageError: no direction is given, or several.
        """
        if self.studied and not self.directions:
            return diffmean_direction(self.loaded, self.text, *self.pair, self.progress)
        if len(self.directions) != 1:
            raise UsageError(f"give one --direction (there are {len(self.directions)})")
        return self.directions[0]

    @cached_property
    def subspace(self) -> Direction:
        """The language subspace of a study."""
        return direction_of(self.loaded, self.text, *self.pair, "language-subspace")

    @property
    def neuron_set(self) -> NeuronSet:
        """The given neurons.

        Raises:
            UsageError: they are not given.
        """
        if self.neurons is None:
            raise UsageError("give --neurons (from `broca identify`)")
        return self.neurons

    def identified(self, method: str) -> NeuronSet:
        """The neurons of the text by a method of ``broca identify``."""
        neurons: NeuronSet = self.once(("neurons", method), lambda: identify(self.loaded, self.text, method))
        return neurons

    def mask(self, method: str, language: str) -> torch.Tensor:
        """bool [L, I], the language's neurons by a method of ``broca identify``.

        Raises:
            BrocaError: the language has none.
        """
        neurons = self.identified(method)
        rows = neurons.of(language)
        if not len(rows):
            raise BrocaError(f"{method} finds no neuron for {language} in this model")
        mask = torch.zeros(neurons.layers, neurons.neurons, dtype=torch.bool)
        mask[rows[:, 0], rows[:, 1]] = True
        return mask

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of ``make``, which is called only on the first use of the key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]
