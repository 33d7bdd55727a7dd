"""Neuron sets: how many neurons of each language and kind there are, where they lie, and what they share."""

from __future__ import annotations

import torch

from editing.report.formats import count, number, plain
from editing.report.markup import Content, Markup, joined, paragraph
from editing.report.matrix import Cell, heat_map
from editing.report.tables import table
from neurons.neuron_sets.comparison import language_overlap
from neurons.neuron_sets.neuron_set import NeuronSet
from neurons.scorers.selection import KINDS

_SETTINGS_SHOWN = ("scope", "top_rate", "threshold", "min_exclusivity", "kinds", "layers", "ends")


def neurons_content(neurons: NeuronSet) -> Markup:
    """Everything of one neuron set."""
    experts = f", {neurons.experts} experts a layer" if neurons.experts > 1 else ""
    settings = neurons.metadata.get("settings") or {}
    shown = {key: settings[key] for key in _SETTINGS_SHOWN if settings.get(key) is not None}
    method = neurons.metadata.get("method") or "a method that the file does not name"
    parts = [
        paragraph(
            f"Found by {method} in {count(neurons.layers)} layers of {count(neurons.neurons)} neurons"
            f"{experts}" + (f"; {plain(shown)}." if shown else ".")
        )
    ]
    if neurons.empty_languages:
        parts.append(
            paragraph(f"No neuron was found for {', '.join(neurons.empty_languages)}.", class_="warning")
        )
    parts += [_kinds(neurons), _layers(neurons)]
    if len(neurons.languages) > 1:
        parts.append(_overlap(neurons))
    return joined(parts)


def _kinds(neurons: NeuronSet) -> Markup:
    rows: list[list[Content]] = []
    for language in neurons.languages:
        scores = neurons.scores[language]
        finite = scores[torch.isfinite(scores)]
        ends = (
            [float(finite.max()), float(finite.median()), float(finite.min())] if len(finite) else [None] * 3
        )
        rows.append(
            [
                language,
                count(len(neurons.of(language))),
                *(count(of_kind) for of_kind in neurons.kind_counts(language).values()),
                *(number(end, ".4g") for end in ends),
            ]
        )
    return table(
        "Neurons by kind (specific: of one language; related: of several; general: of all), and their scores",
        ["language", "neurons", *KINDS, "largest score", "median", "smallest"],
        rows,
    )


def _layers(neurons: NeuronSet) -> Markup:
    rows: list[tuple[Content, list[Cell]]] = []
    for language in neurons.languages:
        sizes = torch.bincount(neurons.of(language)[:, 0], minlength=neurons.layers).tolist()
        # Empty layers are many, and the missing colour says it.
        rows.append((language, [Cell(float(size), count(size) if size else "") for size in sizes]))
    return heat_map(
        "Where they lie: neurons of each language (rows) in each layer (columns, from 0)",
        "language",
        [str(layer) for layer in range(neurons.layers)],
        rows,
        "neurons",
        signed=False,
        form=",.0f",
    )


def _overlap(neurons: NeuronSet) -> Markup:
    overlap = language_overlap(neurons).tolist()
    rows: list[tuple[Content, list[Cell]]] = [
        (
            language,
            [
                Cell(value, count(len(neurons.of(language))), strong=True, plain=True)
                if i == j
                else Cell(value, number(value, ".2f"))
                for j, value in enumerate(overlap[i])
            ],
        )
        for i, language in enumerate(neurons.languages)
    ]
    return heat_map(
        "What languages share: Jaccard index of every two languages' neurons (diagonal: how many each has)",
        "",
        list(neurons.languages),
        rows,
        "Jaccard index",
        least=0.2,
        signed=False,
    )
