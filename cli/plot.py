"""``broca plot``: a picture of a neuron set, of statistics or of an edit."""

from __future__ import annotations

from pathlib import Path

import click

from cli.options import IN_FILE, json_option, out_option
from cli.screen import Screen

# kind of file -> what can be drawn of it, the default first
PICTURES = {
    "neurons": ("layers", "overlap"),
    "statistics": ("entropy", "routing"),
    "edit": ("components",),
}


@click.command("plot")
@click.argument("file", type=IN_FILE)
@click.option(
    "--what",
    type=click.Choice([what for pictures in PICTURES.values() for what in pictures]),
    help="neurons: layers (neurons of each language by layer) or overlap (that languages share); "
    "statistics: entropy (of every neuron over languages) or routing (of tokens to experts); "
    "edit: components (how far each goes, by layer).  [default: layers, entropy or components]",
)
@out_option("File for the picture (.png or .svg).")
@json_option
def command(file: Path, what: str | None, out: Path, as_json: bool) -> None:
    """Draw FILE, a neuron set, statistics or an edit.

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
    if kind not in PICTURES:
        raise BrocaError(
            f"{file}: holds {kind!r}, of which there is no picture: name a file of {' or '.join(PICTURES)}"
        )
    what = PICTURES[kind][0] if what is None else what
    if what not in PICTURES[kind]:
        raise UsageError(
            f"{file}: holds {kind!r}, which --what {what} is not for: choose {' or '.join(PICTURES[kind])}"
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
    screen.result({"out": out, "kind": kind, "what": what}, out)
