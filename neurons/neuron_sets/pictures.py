"""Figures of neuron sets, statistics and comparisons, and how to save them.

Figures grow with their content up to the width of a page; cells too small for numbers show colour only.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from neurons.errors import UsageError
from neurons.files.artifact import write_atomically
from neurons.neuron_sets.comparison import Comparison, language_overlap
from neurons.neuron_sets.neuron_set import NeuronSet
from neurons.scorers.scores import fractions
from neurons.statistics.statistics import Statistics

FORMATS = ("png", "svg")
COLOURS = "Blues"
RESOLUTION = 150  # dots an inch
MAX_WIDTH = 16.0  # inches
MAX_NUMBERED = 24  # rows or columns of a heat map with numbers in its cells
BINS = 60
MAX_NAMED = 8  # languages in a title
TITLE = 10  # points
LETTER, LINE = 0.082, 0.17  # inches in a title: upper bound of a letter's mean width, height of a line


def picture_format(path: Path) -> str:
    """ "png" or "svg", from the suffix.

    Raises:
        UsageError: another suffix.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise UsageError(f"{path}: the name of a picture must end in .png or .svg")
    return kind


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG or SVG file, by the suffix, atomically; equal figures give equal bytes.

    Raises:
        UsageError: as ``picture_format``.
    """
    kind = picture_format(path)
    buffer = io.BytesIO()
    # A random salt or a date would change the bytes.
    with matplotlib.rc_context({"svg.hashsalt": "broca"}):
        empty = {"Software": None} if kind == "png" else {"Date": None}
        figure.savefig(buffer, format=kind, dpi=RESOLUTION, metadata=empty)
    write_atomically(path, buffer.getvalue())


def title_of(what: str, about: Mapping[str, Any], languages: Sequence[str], width: float) -> str:
    """A title: the content, and on further lines method, model and languages.

    Args:
        what: the first line.
        about: metadata of a file: method, model, fingerprint, where known.
        languages: all languages.
        width: width of the title in inches.
    """
    model = about.get("model")
    if model and about.get("fingerprint"):
        # A directory's name alone does not identify a model.
        model = f"{model} ({about['fingerprint'][:8]})"
    named = ", ".join(languages) if len(languages) <= MAX_NAMED else f"{len(languages)} languages"
    letters = max(20, int(width / LETTER))
    lines = textwrap.wrap(what, letters)
    line = ""
    for part in (part for part in (about.get("method"), model, named) if part):
        joined = f"{line}; {part}" if line else part
        if line and len(joined) > letters:
            lines += textwrap.wrap(line, letters)
            joined = part
        line = joined
    return "\n".join([*lines, *textwrap.wrap(line, letters)])


def _more(title: str) -> float:
    """Height in inches of a title beyond its first line."""
    return LINE * title.count("\n")


def layers_figure(neurons: NeuronSet) -> Figure:
    """Heat map of the number of neurons of each language (rows) in each layer (columns)."""
    languages = neurons.languages
    counts = torch.stack(
        [torch.bincount(neurons.of(k)[:, 0], minlength=neurons.layers) for k in languages]
    ).double()
    cell = 0.2 + 0.1 * len(f"{int(counts.max()):,}")
    names = [f"{k}  ({int(total):,})" for k, total in zip(languages, counts.sum(1), strict=True)]
    width = min(MAX_WIDTH, max(4.5, 2.0 + max(map(len, names)) * 0.08 + cell * neurons.layers))
    title = title_of(f"{neurons.unit}s of each language by layer", neurons.metadata, languages, width - 1)
    figure = Figure(figsize=(width, 1.5 + 0.32 * len(languages) + _more(title)), layout="constrained")
    axis = figure.subplots()
    numbered = cell * neurons.layers <= MAX_WIDTH - 3
    _heat_map(figure, axis, counts, f"{neurons.unit}s", "{:,.0f}" if numbered else None)
    for text in axis.texts:
        # Many cells are 0; their colour is enough.
        text.set_visible(text.get_text() != "0")
    axis.set(xlabel="layer")
    axis.set_title(title, fontsize=TITLE)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=max(4, round(width * 2)), integer=True, min_n_ticks=1))
    axis.set_yticks(range(len(languages)), names)
    return figure


def overlap_figure(neurons: NeuronSet) -> Figure:
    """Heat map of the Jaccard index of every pair of languages; the diagonal shows the number of neurons."""
    languages = neurons.languages
    overlap = language_overlap(neurons)
    side = min(MAX_WIDTH - 1.5, 1.6 + 0.45 * len(languages))
    wide = max(4.2, side + 1.2)
    title = title_of(f"{neurons.unit}s that languages share", neurons.metadata, languages, wide - 1)
    figure = Figure(figsize=(wide, max(3.0, side) + _more(title)), layout="constrained")
    axis = figure.subplots()
    shown = overlap.clone().fill_diagonal_(math.nan)
    _heat_map(figure, axis, shown, "Jaccard index", "{:.2f}" if len(languages) <= MAX_NUMBERED else None)
    for i, language in enumerate(languages):
        size = len(neurons.of(language))
        axis.text(i, i, f"{size:,}", ha="center", va="center", fontsize=8, color="black")
    axis.set_xticks(range(len(languages)), languages, **_label_rotation(languages))
    axis.set_yticks(range(len(languages)), languages)
    axis.set_xlabel(f"diagonal: number of {neurons.unit}s")
    axis.set_title(title, fontsize=TITLE)
    return figure


def entropies(statistics: Statistics) -> torch.Tensor:
    """LAPE's entropy (arXiv 2402.16438) of every neuron that ever fires, nats, float64 [n].

    Raises:
        UsageError: no ``mlp_act:positive``, or a single language.
    """
    positive = statistics.moment("mlp_act:positive").double()
    if len(statistics.languages) < 2:
        raise UsageError("an entropy needs at least two languages, but the statistics have one")
    seen = statistics.seen()
    probability = torch.where(seen > 0, positive / seen, 0.0)
    normalised = fractions(probability)
    entropy = -torch.xlogy(normalised, normalised).sum(-1)
    return entropy[(positive > 0).any(-1)]


def entropy_figure(statistics: Statistics) -> Figure:
    """Histogram of the entropy of all neurons that fire, without LAPE's filter."""
    values = entropies(statistics)
    languages = len(statistics.languages)
    maximum = math.log(languages)
    inactive = int(statistics.places("neuron", statistics.moment("mlp_act:positive")).sum()) - len(values)
    what = f"entropy of {len(values):,} neurons over {languages} languages"
    what += f"; {inactive:,} never fire" if inactive else ""
    title = title_of(what, _about(statistics), statistics.languages, 6.5)
    figure = Figure(figsize=(7.5, 4 + _more(title)), layout="constrained")
    axis = figure.subplots()
    # Rounding may put a value just above ln K, outside the last bin.
    axis.hist(values.clamp(0, maximum).numpy(), bins=BINS, range=(0, maximum), color="C0")
    marks = _marked_counts(languages)
    for count in marks:
        axis.axvline(math.log(count), color="black", linewidth=0.8, linestyle=":", zorder=0)
    axis.set_yscale("log")
    axis.set_ylim(bottom=0.7)
    axis.set(
        xlabel="entropy, nats",
        ylabel="neurons",
        xlim=(-0.02 * maximum, 1.02 * maximum),
    )
    axis.set_title(title, fontsize=TITLE)
    top = axis.secondary_xaxis("top")
    top.set_xticks([math.log(count) for count in marks], [str(count) for count in marks], fontsize=8)
    top.set_xlabel("as if this many languages shared the neuron evenly", fontsize=8)
    axis.spines[["right"]].set_visible(False)
    return figure


def _marked_counts(languages: int) -> list[int]:
    """Numbers of languages to mark: all up to 8, else powers of two well below the last, and the last."""
    if languages <= 8:
        return list(range(1, languages + 1))
    return [2**i for i in range(languages.bit_length()) if 2**i < 0.8 * languages] + [languages]


def routing_figure(statistics: Statistics) -> Figure:
    """Heat maps, one for each language, of the fraction of its tokens routed to each expert.

    Raises:
        UsageError: the model has no experts.
    """
    routed = statistics.routing_fraction()
    layers, experts, count = routed.shape
    columns = min(count, 4 if experts > 16 else 6)
    rows = math.ceil(count / columns)
    wide = min((MAX_WIDTH - 1.5) / columns, max(1.7, 0.5 + 0.1 * experts))
    high = min(2.6, max(1.3, 0.5 + 0.1 * layers))
    across = max(5.5, wide * columns + 1.5)
    even = float(routed.nanmean())
    what = f"where each language's tokens are routed (evenly: {even:.3g})"
    title = title_of(what, _about(statistics), (), across)
    figure = Figure(figsize=(across, high * rows + 0.9 + _more(title)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    largest = float(routed[torch.isfinite(routed)].max()) if bool(torch.isfinite(routed).any()) else 1.0
    for k, axis in enumerate(axes.flat):
        if k >= count:
            axis.set_visible(False)
            continue
        image = axis.imshow(
            routed[..., k].numpy(), aspect="auto", cmap=COLOURS, vmin=0, vmax=largest, interpolation="nearest"
        )
        axis.set_title(statistics.languages[k], fontsize=9)
        for line in (axis.xaxis, axis.yaxis):
            line.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
        # The last panel of each column has tick labels, also where the last row is not full.
        axis.tick_params(labelsize=8, labelbottom=k + columns >= count)
    figure.supxlabel("expert", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    figure.suptitle(title, fontsize=TITLE)
    _scale(figure, image, axes, "fraction of tokens")
    return figure


def comparison_figure(comparison: Comparison) -> Figure:
    """Two heat maps of Jaccard indices: every language of every set with every other, and the same language
    in two sets by layer, or in each pair of more sets.
    """
    sets, count = comparison.sizes.shape
    side = sets * count
    map_side = min(9.0, max(3.2, 0.34 * side))
    if sets == 2:
        pair = comparison.pairs[0]
        values, across_label = pair.by_layer.T, "layer"
        labels = [
            f"{k}  ({'-' if math.isnan(j) else f'{j:.2f}'})"
            for k, j in zip(comparison.languages, pair.jaccard.tolist(), strict=True)
        ]
        beside_title = "the same language by layer\n(in brackets: all layers)"
        beside_width = min(5.5, max(2.6, 0.3 * values.shape[1] + 0.8))
    else:
        values = torch.stack([pair.jaccard for pair in comparison.pairs], dim=1)
        labels, across_label = list(comparison.languages), "sets"
        beside_title = "the same language in two sets"
        beside_width = min(5.5, max(2.6, 0.45 * len(comparison.pairs) + 0.8))
    wide = map_side + beside_width + 3.2
    used = "; ".join(
        f"{_short(name, 40)}: {method}"
        for name, method in zip(comparison.names, comparison.methods, strict=True)
        if method and method != name
    )
    title = title_of(
        f"{comparison.unit}s that sets and languages share", comparison.model, (used,) if used else (), wide
    )
    figure = Figure(figsize=(wide, map_side + 1.7 + _more(title)), layout="constrained")
    figure.suptitle(title, fontsize=TITLE)
    left, right = figure.subplots(1, 2, width_ratios=[map_side + 1, beside_width + 0.6])

    across = comparison.across.reshape(side, side).clone().fill_diagonal_(math.nan)
    # One scale for both: they show the same quantity.
    largest = max(_largest(across), _largest(values))
    _heat_map(figure, left, across, None, "{:.2f}" if side <= MAX_NUMBERED else None, largest)
    names = list(comparison.languages) * sets
    small = {"fontsize": 8 if side <= 40 else 6}
    left.set_xticks(range(side), names, **small, rotation=90 if side > 12 or max(map(len, names)) > 3 else 0)
    left.set_yticks(range(side), names, **small)
    for i in range(1, sets):
        for line in (left.axhline, left.axvline):
            line(i * count - 0.5, color="black", linewidth=1)
    centres = [(i + 0.5) * count - 0.5 for i in range(sets)]
    room = max(8, int(map_side / sets / 0.075))
    numbered = [name if sets == 2 else f"{i}: {name}" for i, name in enumerate(comparison.names, 1)]
    shown = [_short(name, room) for name in numbered]
    above = left.secondary_xaxis("top")
    above.set_xticks(centres, shown, fontsize=9)
    beside = left.secondary_yaxis("right")
    beside.set_yticks(centres, shown, fontsize=9, rotation=90, va="center")
    for extra in (above, beside):
        extra.tick_params(length=0)
    left.set_title("languages of every set", fontsize=10)

    _heat_map(figure, right, values, "Jaccard index", "{:.2f}" if values.shape[1] <= 12 else None, largest)
    right.set_yticks(range(count), labels, **small)
    right.set_title(beside_title, fontsize=10)
    empty = f" (grey: neither has a {comparison.unit})" if bool(torch.isnan(values).any()) else ""
    right.set_xlabel(across_label + empty)
    if sets == 2:
        right.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    else:
        between = [f"{pair.first + 1}, {pair.second + 1}" for pair in comparison.pairs]
        right.set_xticks(range(len(between)), between, fontsize=8, rotation=90 if len(between) > 12 else 0)
    return figure


def _largest(values: torch.Tensor) -> float:
    finite = values[torch.isfinite(values)]
    return float(finite.max()) if len(finite) else 0.0


def _heat_map(
    figure: Figure,
    axis: Any,
    values: torch.Tensor,
    label: str | None,
    number: str | None,
    largest: float | None = None,
) -> None:
    """Values [rows, columns] as colours from 0 up, NaN grey, with numbers if a format is given.

    Without a label no colour bar is drawn; ``largest`` is the end of the scale, by default the maximum.
    """
    largest = _largest(values) if largest is None else largest
    colours = matplotlib.colormaps[COLOURS].with_extremes(bad="0.85")
    image = axis.imshow(
        values.numpy(), aspect="auto", cmap=colours, vmin=0, vmax=largest or 1, interpolation="nearest"
    )
    if label is not None:
        _scale(figure, image, axis, label)
    if number is None:
        return
    finite = torch.isfinite(values)
    for (row, column), value in zip(finite.nonzero().tolist(), values[finite].tolist(), strict=True):
        colour = "white" if value > 0.6 * largest else "black"
        axis.text(column, row, number.format(value), ha="center", va="center", fontsize=8, color=colour)


def _scale(figure: Figure, image: Any, axes: Any, label: str) -> None:
    """A colour bar 0.2 inches wide, independent of the size of the figure."""
    wide, high = figure.get_size_inches()
    bar = figure.colorbar(
        image, ax=axes, label=label, pad=0.15 / wide, fraction=1.0 / wide, aspect=high / 0.2
    )
    whole = label in ("neurons", "heads")
    bar.locator = MaxNLocator(nbins=6, integer=whole, min_n_ticks=1)
    bar.update_ticks()


def _label_rotation(labels: Sequence[str]) -> dict[str, Any]:
    """Tick label options that keep long names from overlapping."""
    return {"rotation": 45, "ha": "right"} if max(map(len, labels)) > 3 else {}


def _about(statistics: Statistics) -> dict[str, Any]:
    return {"model": statistics.metadata.get("model"), "fingerprint": statistics.fingerprint}


def _short(name: str, length: int) -> str:
    """A name shortened in the middle: file names differ at either end."""
    if len(name) <= length:
        return name
    end = (length - 1) // 2
    return name[: length - 1 - end] + "\N{HORIZONTAL ELLIPSIS}" + name[len(name) - end :]
