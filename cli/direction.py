"""``broca direction``: from one language to another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli.corpora import read, tell_read
from cli.loading import announced
from cli.options import (
    FINITE,
    IN_DIRECTORY,
    IN_PATH,
    LANGUAGE,
    OUT_FILE,
    PARTS,
    CommaSeparated,
    bits_asked,
    device_options,
    dry_run_option,
    json_option,
    quantised_options,
    tokens_option,
)
from cli.screen import Screen
from cli.tables import direction_table

if TYPE_CHECKING:
    from editing.directions.direction import Direction
    from editing.directions.sae import Autoencoder

LIST = "list"


@click.command("direction")
@click.argument("model", required=False)
@click.option(
    "--corpus",
    type=IN_DIRECTORY,
    help="Directory of <language>.txt, .jsonl or .parquet, one text a line or row.",
)
@click.option("--languages", type=CommaSeparated(), help="Which of the corpus, as en,fr,de.  [default: all]")
@click.option(
    "--part",
    type=click.Choice(PARTS),
    default="all",
    show_default=True,
    help="Lines to read: half to estimate from, a quarter to choose settings on, a quarter to report, by "
    "line number.",
)
@click.option("--source", type=LANGUAGE, help="Language to steer from.")
@click.option("--target", type=LANGUAGE, help="Language to steer to.")
@click.option(
    "--method", default="diffmean", show_default=True, help="One of `broca direction --method list`."
)
@click.option(
    "--winsorise",
    type=FINITE,
    metavar="Q",
    help="Clip each coordinate of the texts' means to its quantiles 1-Q to Q before averaging, as 0.995.",
)
@click.option("--project-neutral", is_flag=True, help="Take off what lies along the mean of both languages.")
@click.option(
    "--unit-length", is_flag=True, help="Vectors of length 1.  [default: as long as DiffMean along it]"
)
@click.option(
    "--sae", "saes", type=IN_PATH, multiple=True, help="sae: autoencoder, SAE-Lens or Gemma-Scope; repeat."
)
@click.option(
    "--sae-layer",
    "sae_layers",
    type=click.IntRange(min=0),
    multiple=True,
    help="sae: the layer that each --sae reads, in order.  [default: what its configuration says]",
)
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="A setting of the method.")
@tokens_option
@device_options
@dry_run_option
@quantised_options
@click.option("--out", type=OUT_FILE, help="File for the direction (.safetensors).")
@json_option
def command(**options: Any) -> None:
    """Take the direction from one language to another in MODEL (hub id or directory).

    \b
    Examples:
      broca direction artifacts/demo/model --corpus artifacts/demo/corpus --source en --target fr \\
          --out direction.safetensors
      broca direction artifacts/demo/model --corpus artifacts/demo/corpus --source en --target fr \\
          --method low-rank-shift --winsorise 0.995 --out direction.safetensors
      broca direction --method list
    """
    asked = SimpleNamespace(**options)
    screen = Screen(asked.as_json)
    if asked.method == LIST:
        _list(screen)
        return
    from editing.directions.estimation import direction_of
    from editing.directions.registry import method_of
    from neurons.models.processes import is_first
    from neurons.models.source import load_model
    from neurons.scorers.setting import assigned, read_settings
    from neurons.text.token_budget import DIRECTIONS

    method = method_of(asked.method)
    _require(asked)
    settings = read_settings(method.settings(), assigned(asked.assignments))
    corpus = read(screen, asked.corpus, asked.languages, asked.part)
    autoencoders = _autoencoders(asked)
    if asked.dry_run:
        from cli.dry_run import dry_run_of_text
        from editing.pipeline.needs import direction_need

        dry_run_of_text(screen, asked, corpus, direction_need)
        return
    loaded = announced(screen, load_model(asked.model, asked.device, asked.dtype, bits=bits_asked(asked)))
    with screen.progress("Recording the direction", None, "tokens") as advance:
        found = direction_of(
            loaded,
            corpus,
            asked.source,
            asked.target,
            asked.method,
            winsorised=asked.winsorise,
            project_neutral=asked.project_neutral,
            unit_length=asked.unit_length,
            tokens=asked.tokens,
            settings=settings,
            autoencoders=autoencoders,
            progress=advance,
        )
    if not is_first():
        return
    found.save(asked.out)
    tell_read(screen, found.metadata["read"], DIRECTIONS.minimum)
    _show(screen, found, asked)


def _require(asked: SimpleNamespace) -> None:
    from neurons.errors import UsageError

    for name, what in (
        ("corpus", "a directory of <language>.txt"),
        ("source", "the language to steer from"),
        ("target", "the language to steer to"),
        ("out", "the file for the direction"),
    ):
        if getattr(asked, name) is None:
            raise UsageError(f"--{name} is missing: {what}")
    if asked.model is None:
        raise UsageError("name the MODEL: a hub id or a directory")


def _autoencoders(asked: SimpleNamespace) -> list[Autoencoder]:
    from editing.directions.sae_files import read_autoencoder
    from neurons.errors import UsageError

    if asked.sae_layers and len(asked.sae_layers) != len(asked.saes):
        raise UsageError(
            f"{len(asked.saes)} --sae and {len(asked.sae_layers)} --sae-layer: give a layer for each "
            "autoencoder, or for none"
        )
    layers = asked.sae_layers or [None] * len(asked.saes)
    return [read_autoencoder(path, layer) for path, layer in zip(asked.saes, layers, strict=True)]


def _list(screen: Screen) -> None:
    from editing.directions.registry import METHODS
    from neurons.scorers.setting import defaults

    screen.table(
        "methods",
        ["method", "what it is", "source", "needs", "settings"],
        [
            [
                name,
                method.line,
                method.source,
                method.needs,
                ", ".join(
                    f"{key}={'-' if one.default is None else one.default}"
                    for key, one in method.settings().items()
                ),
            ]
            for name, method in METHODS.items()
        ],
        words=5,
    )
    screen.result(
        {
            name: {
                "line": method.line,
                "source": method.source,
                "needs": method.needs,
                "settings": defaults(method.settings()),
            }
            for name, method in METHODS.items()
        }
    )


def _show(screen: Screen, found: Direction, asked: SimpleNamespace) -> None:
    norms = direction_table(screen, found)
    screen.result(
        {"out": asked.out, "source": found.source, "target": found.target, "norms": norms, **found.metadata},
        asked.out,
    )
