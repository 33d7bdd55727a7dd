"""Section on a neuron set: counts by language and kind, the layers, and the overlap of languages."""

from __future__ import annotations

import torch
from markupsafe import Markup

from editing.report.formats import count, number
from editing.report.heat_maps import Cell, HeatMap
from editing.report.templating import rendered
from neurons.neuron_sets.comparison import language_overlap
from neurons.neuron_sets.neuron_set import NeuronSet
from neurons.scorers.selection import KINDS

_SETTINGS_SHOWN = ("scope", "top_rate", "threshold", "min_exclusivity", "kinds", "layers", "ends")


def neurons_content(neurons: NeuronSet) -> Markup:
    """The section of one neuron set."""
    settings = neurons.metadata.get("settings") or {}
    return rendered(
        "neurons",
        neurons=neurons,
        method=neurons.metadata.get("method") or "a method that the file does not name",
        settings={key: settings[key] for key in _SETTINGS_SHOWN if settings.get(key) is not None},
        KINDS=KINDS,
        kinds=[_kinds(neurons, language) for language in neurons.languages],
        maps=[_layers(neurons), *([_overlap(neurons)] if len(neurons.languages) > 1 else [])],
    )


def _kinds(neurons: NeuronSet, language: str) -> list[str]:
    scores = neurons.scores[language]
    finite = scores[torch.isfinite(scores)]
    ends = (
        [float(end) for end in (finite.max(), finite.median(), finite.min())] if len(finite) else [None] * 3
    )
    counts = (len(neurons.of(language)), *neurons.kind_counts(language).values())
    return [language, *map(count, counts), *(number(end, ".4g") for end in ends)]


def _layers(neurons: NeuronSet) -> HeatMap:
    rows = []
    for language in neurons.languages:
        sizes = torch.bincount(neurons.of(language)[:, 0], minlength=neurons.layers).tolist()
        # A layer without neurons has an empty cell.
        rows.append((language, [Cell(float(size), count(size) if size else "") for size in sizes]))
    return HeatMap(
        f"Where they lie: {neurons.unit}s of each language (rows) in each layer (columns, from 0)",
        ["language", *map(str, range(neurons.layers))],
        rows,
        f"{neurons.unit}s",
        signed=False,
        form=",.0f",
    )


def _overlap(neurons: NeuronSet) -> HeatMap:
    rows = []
    for i, (language, overlaps) in enumerate(
        zip(neurons.languages, language_overlap(neurons).tolist(), strict=True)
    ):
        cells = [Cell(overlap, number(overlap, ".2f")) for overlap in overlaps]
        cells[i] = Cell(overlaps[i], count(len(neurons.of(language))), strong=True, plain=True)
        rows.append((language, cells))
    return HeatMap(
        f"What languages share: Jaccard index of every two languages' {neurons.unit}s (diagonal: how many each has)",
        ["", *neurons.languages],
        rows,
        "Jaccard index",
        min_scale=0.2,
        signed=False,
    )
