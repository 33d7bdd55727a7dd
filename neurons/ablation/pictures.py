"""Figures of an ablation study: its matrices as heat maps, and its dose-response curves."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from neurons.ablation.study import SetOutcome, Study, set_title
from neurons.neuron_sets.pictures import MAX_NUMBERED, MAX_WIDTH

COLOURS = "RdBu_r"
_COLUMNS = 3


def matrix_figure(study: Study) -> Figure:
    """Heat maps, outcome for each set, of the rise of each language's loss without each language's neurons.

    A column on the right shows the mean rise of the row's language without as many random neurons.
    """
    count, sets = len(study.languages), study.sets
    columns = min(len(sets), _COLUMNS)
    rows = math.ceil(len(sets) / columns)
    side = min((MAX_WIDTH - 2) / columns, max(3.2, 0.62 * (count + 1) + 1.2))
    figure = Figure(figsize=(side * columns + 1.4, side * 0.92 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    maximum = max(float(outcome.own.change.abs().max()) for outcome in sets) or 1.0
    image: Any = None
    for place, axis in enumerate(axes.flat):
        if place >= len(sets):
            axis.set_visible(False)
            continue
        outcome = sets[place]
        values, names = _with_random(outcome, list(study.languages))
        colours = matplotlib.colormaps[COLOURS].with_extremes(bad="0.85")
        image = axis.imshow(
            values.numpy(), cmap=colours, vmin=-maximum, vmax=maximum, interpolation="nearest", aspect="auto"
        )
        if count <= MAX_NUMBERED:
            for i, row in enumerate(values.tolist()):
                for j, value in enumerate(row):
                    dark = abs(value) > 0.6 * maximum
                    axis.text(
                        j,
                        i,
                        f"{value:+.2f}" if abs(value) >= 0.005 else "0",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if dark else "black",
                        fontweight="bold" if i == j else "normal",
                    )
        if len(names) > count:
            axis.axvline(count - 0.5, color="white", linewidth=3)
        slant = {"rotation": 45, "ha": "right"} if max(map(len, names)) > 6 else {}
        axis.set_xticks(range(len(names)), names, **slant)
        axis.set_yticks(range(count), study.languages)
        figures = "{:.1f} [{:.1f}, {:.1f}]".format(outcome.specificity.value, *outcome.specificity.interval)
        axis.set_title(f"{set_title(outcome.name, outcome.method)}\nspecificity {figures}", fontsize=9)
        axis.set_xlabel("measured language")
        axis.set_ylabel("ablated language")
    figure.colorbar(image, ax=axes, label="rise of the loss, nats a token", aspect=30, pad=0.02)
    return figure


def doses_figure(study: Study) -> Figure:
    """Rise of the ablated language's loss by fraction of neurons, with interval; others' mean dashed."""
    sets = study.sets
    columns = min(len(sets), _COLUMNS)
    rows = math.ceil(len(sets) / columns)
    figure = Figure(figsize=(min(MAX_WIDTH, 4.6 * columns + 1.0), 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for place, axis in enumerate(axes.flat):
        if place >= len(sets):
            axis.set_visible(False)
            continue
        outcome = sets[place]
        percents = [100 * dose.share for dose in outcome.doses]
        changes = torch.stack([dose.changes.change for dose in outcome.doses])
        lows = torch.stack([dose.changes.low for dose in outcome.doses])
        highs = torch.stack([dose.changes.high for dose in outcome.doses])
        count = len(study.languages)
        for i, language in enumerate(study.languages):
            colour = f"C{i % 10}"
            axis.plot(percents, changes[:, i, i], marker="o", markersize=3, color=colour, label=language)
            axis.fill_between(percents, lows[:, i, i], highs[:, i, i], color=colour, alpha=0.2, linewidth=0)
            others = (changes[:, i].sum(-1) - changes[:, i, i]) / (count - 1)
            axis.plot(percents, others, linestyle="--", linewidth=0.9, color=colour)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_xscale("log")
        axis.set_xticks(percents, [f"{percent:g}" for percent in percents], minor=False)
        axis.set_xticks([], minor=True)
        whole = f"{'the model' if study.settings.dose_of_model else 'each language'}'s {outcome.unit}s"
        axis.set_xlabel(f"ablated, % of {whole}, best first")
        axis.set_title(set_title(outcome.name, outcome.method), fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("rise of the loss, nats a token\n(solid: ablated language, dashed: mean of others)")
    axes[0, 0].legend(fontsize=8, frameon=False, ncols=2 if len(study.languages) > 5 else 1)
    return figure


def _with_random(outcome: SetOutcome, languages: list[str]) -> tuple[torch.Tensor, list[str]]:
    """The matrix [K, K + controls] with the controls' diagonals last, and its column names."""
    columns, names = [outcome.own.change], languages
    for control, draws in outcome.controls.items():
        if draws:
            diagonal = torch.stack([draw.change.diagonal() for draw in draws]).mean(0)
            columns.append(diagonal[:, None])
            names = [*names, control]
    return torch.cat(columns, dim=1), names
