"""Pictures of neuron sets, statistics and comparisons: matplotlib figures, and one way to write them.

Sizes grow with what is shown, within what a page holds; where numbers would not fit, colour alone speaks.
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
WIDEST = 16.0  # inches
MOST_NUMBERED = 24  # rows or columns of a heat map whose cells hold numbers
BINS = 60
MOST_NAMED = 8  # languages in a title
TITLE = 10  # points
LETTER, LINE = 0.082, 0.17  # inches, of a title: a letter's mean width, generously, and a line's height


def picture_format(path: Path) -> str:
    """png or svg, by the suffix.

    Raises:
        UsageError: another suffix.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise UsageError(f"{path}: a picture ends in .png or .svg")
    return kind


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG or SVG, by the suffix, atomically; equal figures give equal bytes.

    Raises:
        UsageError: as ``picture_format``.
    """
    kind = picture_format(path)
    buffer = io.BytesIO()
    # Without a fixed salt and date the same numbers would give other bytes.
    with matplotlib.rc_context({"svg.hashsalt": "broca"}):
        empty = {"Software": None} if kind == "png" else {"Date": None}
        figure.savefig(buffer, format=kind, dpi=RESOLUTION, metadata=empty)
    write_atomically(path, buffer.getvalue())


def titled(what: str, about: Mapping[str, Any], languages: Sequence[str], wide: float) -> str:
    """A title: what is shown, and beneath it by which method, of which model and of which languages.

    Args:
        what: the first line.
        about: a file's metadata: method, model, fingerprint, each where it is known.
        languages: all of them.
        wide: inches that the title has.
    """
    model = about.get("model")
    if model and about.get("fingerprint"):
        # A directory's name is not much of a name.
        model = f"{model} ({about['fingerprint'][:8]})"
    some = ", ".join(languages) if len(languages) <= MOST_NAMED else f"{len(languages)} languages"
    most = max(20, int(wide / LETTER))
    lines = textwrap.wrap(what, most)
    told = ""
    for part in (part for part in (about.get("method"), model, some) if part):
        joined = f"{told}; {part}" if told else part
        if told and len(joined) > most:
            lines += textwrap.wrap(told, most)
            joined = part
        told = joined
    return "\n".join([*lines, *textwrap.wrap(told, most)])


def _more(title: str) -> float:
    """Inches that a title takes beyond its first line."""
    return LINE * title.count("\n")


def layers_figure(neurons: NeuronSet) -> Figure:
    """How many neurons each language has in each layer: a heat map, languages down, layers across."""
    languages = neurons.languages
    counts = torch.stack(
        [torch.bincount(neurons.of(k)[:, 0], minlength=neurons.layers) for k in languages]
    ).double()
    cell = 0.2 + 0.1 * len(f"{int(counts.max()):,}")
    names = [f"{k}  ({int(total):,})" for k, total in zip(languages, counts.sum(1), strict=True)]
    width = min(WIDEST, max(4.5, 2.0 + max(map(len, names)) * 0.08 + cell * neurons.layers))
    title = titled("neurons of each language by layer", neurons.metadata, languages, width - 1)
    figure = Figure(figsize=(width, 1.5 + 0.32 * len(languages) + _more(title)), layout="constrained")
    axis = figure.subplots()
    numbered = cell * neurons.layers <= WIDEST - 3
    _heat_map(figure, axis, counts, "neurons", "{:,.0f}" if numbered else None)
    for text in axis.texts:
        # Empty layers are many, and the colour says it.
        text.set_visible(text.get_text() != "0")
    axis.set(xlabel="layer")
    axis.set_title(title, fontsize=TITLE)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=max(4, round(width * 2)), integer=True, min_n_ticks=1))
    axis.set_yticks(range(len(languages)), names)
    return figure


def overlap_figure(neurons: NeuronSet) -> Figure:
    """Jaccard index of every two languages; the diagonal, which would be 1, tells how many neurons."""
    languages = neurons.languages
    overlap = language_overlap(neurons)
    side = min(WIDEST - 1.5, 1.6 + 0.45 * len(languages))
    wide = max(4.2, side + 1.2)
    title = titled("neurons that languages share", neurons.metadata, languages, wide - 1)
    figure = Figure(figsize=(wide, max(3.0, side) + _more(title)), layout="constrained")
    axis = figure.subplots()
    shown = overlap.clone().fill_diagonal_(math.nan)
    _heat_map(figure, axis, shown, "Jaccard index", "{:.2f}" if len(languages) <= MOST_NUMBERED else None)
    for i, language in enumerate(languages):
        size = len(neurons.of(language))
        axis.text(i, i, f"{size:,}", ha="center", va="center", fontsize=8, color="black")
    axis.set_xticks(range(len(languages)), languages, **_slanted(languages))
    axis.set_yticks(range(len(languages)), languages)
    axis.set_xlabel("diagonal: how many each has")
    axis.set_title(title, fontsize=TITLE)
    return figure


def entropies(statistics: Statistics) -> torch.Tensor:
    """LAPE's entropy (arXiv 2402.16438) of every neuron that ever fires, nats, float64 [n].

    Raises:
        UsageError: no ``mlp_act:positive``, or a single language.
    """
    positive = statistics.moment("mlp_act:positive").double()
    if len(statistics.languages) < 2:
        raise UsageError("an entropy over languages needs at least two, and the statistics have one")
    seen = statistics.seen()
    probability = torch.where(seen > 0, positive / seen, 0.0)
    share = fractions(probability)
    entropy = -torch.xlogy(share, share).sum(-1)
    return entropy[(positive > 0).any(-1)]


def entropy_figure(statistics: Statistics) -> Figure:
    """Histogram of the entropy of all neurons that fire, none hidden by LAPE's filter."""
    found = entropies(statistics)
    layers, width, languages = statistics.moment("mlp_act:positive").shape
    most = math.log(languages)
    silent = layers * width - len(found)
    what = f"entropy of {len(found):,} neurons over {languages} languages"
    what += f"; {silent:,} never fire" if silent else ""
    title = titled(what, _about(statistics), statistics.languages, 6.5)
    figure = Figure(figsize=(7.5, 4 + _more(title)), layout="constrained")
    axis = figure.subplots()
    # Rounding may carry an even neuron just past ln K, and out of the last bin.
    axis.hist(found.clamp(0, most).numpy(), bins=BINS, range=(0, most), color="C0")
    marks = _shares_of(languages)
    for count in marks:
        axis.axvline(math.log(count), color="black", linewidth=0.8, linestyle=":", zorder=0)
    axis.set_yscale("log")
    axis.set_ylim(bottom=0.7)
    axis.set(
        xlabel="entropy, nats",
        ylabel="neurons",
        xlim=(-0.02 * most, 1.02 * most),
    )
    axis.set_title(title, fontsize=TITLE)
    top = axis.secondary_xaxis("top")
    top.set_xticks([math.log(count) for count in marks], [str(count) for count in marks], fontsize=8)
    top.set_xlabel("as if this many languages shared the neuron evenly", fontsize=8)
    axis.spines[["right"]].set_visible(False)
    return figure


def _shares_of(languages: int) -> list[int]:
    """Numbers of languages to mark: all of a few, else powers of two and the last, none too close to it."""
    if languages <= 8:
        return list(range(1, languages + 1))
    return [2**i for i in range(languages.bit_length()) if 2**i < 0.8 * languages] + [languages]


def routing_figure(statistics: Statistics) -> Figure:
    """Share of each language's tokens that reached each expert: a heat map a language, one scale for all.

    Raises:
        UsageError: the model has no experts.
    """
    share = statistics.routing_share()
    layers, experts, count = share.shape
    columns = min(count, 4 if experts > 16 else 6)
    rows = math.ceil(count / columns)
    wide = min((WIDEST - 1.5) / columns, max(1.7, 0.5 + 0.1 * experts))
    high = min(2.6, max(1.3, 0.5 + 0.1 * layers))
    across = max(5.5, wide * columns + 1.5)
    even = float(share.nanmean())
    what = f"where each language's tokens are routed (evenly: {even:.3g})"
    title = titled(what, _about(statistics), (), across)
    figure = Figure(figsize=(across, high * rows + 0.9 + _more(title)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    largest = float(share[torch.isfinite(share)].max()) if bool(torch.isfinite(share).any()) else 1.0
    for k, axis in enumerate(axes.flat):
        if k >= count:
            axis.set_visible(False)
            continue
        image = axis.imshow(
            share[..., k].numpy(), aspect="auto", cmap=COLOURS, vmin=0, vmax=largest, interpolation="nearest"
        )
        axis.set_title(statistics.languages[k], fontsize=9)
        for line in (axis.xaxis, axis.yaxis):
            line.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
        # The last panel of a column has the numbers, also where the last row is not full.
        axis.tick_params(labelsize=8, labelbottom=k + columns >= count)
    figure.supxlabel("expert", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    figure.suptitle(title, fontsize=TITLE)
    _scale(figure, image, axes, "share of tokens")
    return figure


def comparison_figure(comparison: Comparison) -> Figure:
    """Two heat maps of Jaccard indices: every language of every set with every other, and beside it two
    sets layer by layer, or the pairs of more sets.
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
        beside_title = "the same language, layer by layer\n(in brackets: in all layers)"
        beside_width = min(5.5, max(2.6, 0.3 * values.shape[1] + 0.8))
    else:
        values = torch.stack([pair.jaccard for pair in comparison.pairs], dim=1)
        labels, across_label = list(comparison.languages), "sets"
        beside_title = "the same language in two sets"
        beside_width = min(5.5, max(2.6, 0.45 * len(comparison.pairs) + 0.8))
    wide = map_side + beside_width + 3.2
    told = "; ".join(
        f"{_short(name, 40)}: {method}"
        for name, method in zip(comparison.names, comparison.methods, strict=True)
        if method and method != name
    )
    title = titled("neurons that sets and languages share", comparison.model, (told,) if told else (), wide)
    figure = Figure(figsize=(wide, map_side + 1.7 + _more(title)), layout="constrained")
    figure.suptitle(title, fontsize=TITLE)
    left, right = figure.subplots(1, 2, width_ratios=[map_side + 1, beside_width + 0.6])

    across = comparison.across.reshape(side, side).clone().fill_diagonal_(math.nan)
    # One scale for both, as both hold the same quantity.
    largest = max(_largest(across), _largest(values))
    _heat_map(figure, left, across, None, "{:.2f}" if side <= MOST_NUMBERED else None, largest)
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
    empty = " (grey: neither has a neuron)" if bool(torch.isnan(values).any()) else ""
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
    """Values [rows, columns] as colours from 0 up, NaN grey, and in numbers where a format is given.

    Without a label there is no scale beside it; without the largest value the scale ends at these values'.
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
    there = torch.isfinite(values)
    for (row, column), value in zip(there.nonzero().tolist(), values[there].tolist(), strict=True):
        colour = "white" if value > 0.6 * largest else "black"
        axis.text(column, row, number.format(value), ha="center", va="center", fontsize=8, color=colour)


def _scale(figure: Figure, image: Any, axes: Any, label: str) -> None:
    """A colour scale as wide as a finger, whatever the size of the figure."""
    wide, high = figure.get_size_inches()
    bar = figure.colorbar(
        image, ax=axes, label=label, pad=0.15 / wide, fraction=1.0 / wide, aspect=high / 0.2
    )
    whole = label == "neurons"
    bar.locator = MaxNLocator(nbins=6, integer=whole, min_n_ticks=1)
    bar.update_ticks()


def _slanted(labels: Sequence[str]) -> dict[str, Any]:
    """Long names under a narrow column would run into each other."""
    return {"rotation": 45, "ha": "right"} if max(map(len, labels)) > 3 else {}


def _about(statistics: Statistics) -> dict[str, Any]:
    return {"model": statistics.metadata.get("model"), "fingerprint": statistics.fingerprint}


def _short(name: str, most: int) -> str:
    """Both ends of a name that is too long: files differ in either."""
    if len(name) <= most:
        return name
    end = (most - 1) // 2
    return name[: most - 1 - end] + "\N{HORIZONTAL ELLIPSIS}" + name[len(name) - end :]
