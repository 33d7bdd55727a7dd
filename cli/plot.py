"""``broca plot``: a plot of a neuron set, statistics or an edit."""

from __future__ import annotations

from pathlib import Path

import click

from cli import options as opt
from cli.screen import Screen

# Kind of file -> its plots, the default first.
PLOTS = {
    "neurons": ("layers", "overlap"),
    "statistics": ("entropy", "routing"),
    "edit": ("components",),
}


@click.command("plot")
@click.argument("file", type=opt.IN_FILE)
@click.option(
    "--what",
    type=click.Choice([what for plots in PLOTS.values() for what in plots]),
    help="neurons: layers (neurons per language and layer) or overlap (of languages); "
    "statistics: entropy (of each neuron over languages) or routing (of tokens to experts); "
    "edit: components (norm of each change, by layer).  [default: layers, entropy or components]",
)
@opt.out("File for the plot (.png or .svg).")
@opt.json
def command(file: Path, what: str | None, out: Path, as_json: bool) -> None:
    """Plot FILE: a neuron set, statistics or an edit.

    \b
    Example:
      broca plot neurons.safetensors --out layers.png
    """
    from editing.plans.plan import load_plan
    from editing.plans.plan_pictures import plan_figure
    from neurons.errors import BrocaError, UsageError
    from neurons.files.artifact import load_artifact
    from neurons.neuron_sets import pictures
    from neurons.neuron_sets.neuron_set import load_neuron_set
    from neurons.statistics.statistics import load_statistics

    screen = Screen(as_json)
    pictures.picture_format(out)
    kind = load_artifact(file).kind
    if kind not in PLOTS:
        raise BrocaError(f"{file}: contains {kind!r}, which has no plot: give a file of {' or '.join(PLOTS)}")
    what = PLOTS[kind][0] if what is None else what
    if what not in PLOTS[kind]:
        raise UsageError(
            f"{file}: contains {kind!r}, which --what {what} does not support: choose {' or '.join(PLOTS[kind])}"
        )
    if kind == "neurons":
        neurons = load_neuron_set(file)
        figure = pictures.layers_figure(neurons) if what == "layers" else pictures.overlap_figure(neurons)
    elif kind == "edit":
        figure = plan_figure(load_plan(file))
    else:
        statistics = load_statistics(file)
        figure = (
            pictures.entropy_figure(statistics) if what == "entropy" else pictures.routing_figure(statistics)
        )
    pictures.save_figure(figure, out)
    screen.result(out=out, kind=kind, what=what)
