"""The logit lens by language as a figure and a table."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from editing.evaluation.lens import LanguageLens
from editing.report.curves import SIZE, style, tidy
from editing.report.formats import number
from editing.report.inline_svg import label


def lens_lines(lens: LanguageLens, source: str, target: str) -> dict[str, list[str]]:
    """Title of a line -> its languages: source, target and all others together."""
    others = [language for language in lens.languages if language not in (source, target)]
    return {source: [source], target: [target], **({"other languages": others} if others else {})}


def lens_figure(lens: LanguageLens, source: str, target: str) -> Figure:
    """Mass of source, target and other languages over layers; the unedited model dashed."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    layers = range(len(next(iter(lens.masses.values()))))
    for place, (title, languages) in enumerate(lens_lines(lens, source, target).items()):
        for model in lens.masses:
            unedited = model == "base" and len(lens.masses) > 1
            axis.plot(
                layers,
                lens.mass(model, languages),
                label=label(f"{title}, {model}"),
                **style(place),
                markersize=3.5,
                markerfacecolor="white" if unedited else None,
                linewidth=1.4,
                linestyle="--" if unedited else "-",
            )
    tidy(axis)
    axis.set(xlabel="after layer", ylabel="mass on the language's tokens", ylim=(0, None))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def lens_table(lens: LanguageLens, source: str, target: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the masses after each layer."""
    columns = {
        f"{title}, {model}": lens.mass(model, languages)
        for title, languages in lens_lines(lens, source, target).items()
        for model in lens.masses
    }
    rows = [
        [str(layer), *(number(value, ".3f") for value in values)]
        for layer, values in enumerate(zip(*columns.values(), strict=True))
    ]
    return ["layer", *columns], rows
