"""``broca direction``: the direction from one language to another."""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli import options as opt
from cli.corpora import noted_corpus, read_table
from cli.loading import loaded_model
from cli.screen import Screen
from cli.tables import direction_table, list_methods

if TYPE_CHECKING:
    from editing.directions.autoencoder import Autoencoder
    from editing.directions.direction import Direction
    from editing.directions.method import DirectionMethod


@click.command("direction")
@click.argument("model", required=False)
@partial(opt.corpus, required=False)
@click.option(
    "--preferences",
    type=opt.IN_FILE,
    help='Rows {"prompt": ..., "chosen": ..., "rejected": ...} (.jsonl) instead of --corpus; bipo and grains need them.',
)
@click.option(
    "--source", type=opt.LANGUAGE, help="Language to steer from.  [default with --preferences: rejected]"
)
@click.option(
    "--target", type=opt.LANGUAGE, help="Language to steer to.  [default with --preferences: chosen]"
)
@opt.method("direction", "diffmean")
@click.option(
    "--winsorise",
    type=opt.FINITE,
    metavar="Q",
    help="Clip each coordinate of the text means to its quantiles 1-Q and Q before averaging, as 0.995.",
)
@click.option(
    "--project-neutral", is_flag=True, help="Remove the component along the mean of both languages."
)
@click.option(
    "--unit-length",
    is_flag=True,
    help="Normalise the vectors.  [default: the length of DiffMean along the vector]",
)
@click.option(
    "--sae",
    "saes",
    type=opt.IN_PATH,
    multiple=True,
    help="sae: autoencoder of SAE-Lens or Gemma-Scope; may be repeated.",
)
@click.option(
    "--sae-layer",
    "sae_layers",
    type=click.IntRange(min=0),
    multiple=True,
    help="sae: layer of each --sae, in order.  [default: from its configuration]",
)
@click.option(
    "--convert",
    type=opt.IN_PATH,
    help="A direction to write as vectors for llama.cpp and EasySteer (.gguf) or vLLM-Hook (.pt), without MODEL.",
)
@click.option("--layer", type=click.IntRange(min=0), help="--convert to .pt: the layer of the vector.")
@opt.tokens
@opt.device
@opt.dry_run
@opt.quantised
@click.option(
    "--out",
    type=opt.OUT_FILE,
    help="File for the direction (.safetensors), or for its vectors (.gguf or .pt).",
)
@opt.json
def command(**options: Any) -> None:
    """Estimate the direction from one language to another in MODEL (hub id or directory).

    \b
    Examples:
      broca direction artifacts/demo/model --corpus artifacts/demo/corpus --source en --target fr \\
          --out direction.safetensors
      broca direction artifacts/demo/model --corpus artifacts/demo/corpus --source en --target fr \\
          --method low-rank-shift --winsorise 0.995 --out direction.safetensors
      broca direction artifacts/demo/model --preferences artifacts/demo/preferences.jsonl --source en --target fr \\
          --method bipo --out direction.safetensors
      broca direction --convert direction.safetensors --out vectors.gguf
      broca direction --convert direction.safetensors --layer 3 --out vector.pt
      broca direction --method list
    """
    arguments = SimpleNamespace(**options)
    screen = Screen(arguments.as_json)
    if arguments.method == opt.LIST:
        from editing.directions.registry import METHODS

        list_methods(screen, METHODS, {"needs": attrgetter("needs")})
        return
    if arguments.convert is not None:
        _convert(screen, arguments)
        return
    from editing.directions.estimation import checked_method, direction_of
    from editing.directions.registry import method_of
    from neurons.setting import assigned, read_settings

    method = method_of(arguments.method)
    _require(arguments)
    settings = read_settings(method.settings(), assigned(arguments.assignments))
    length = {
        "winsorised": arguments.winsorise,
        "project_neutral": arguments.project_neutral,
        "unit_length": arguments.unit_length,
    }
    if arguments.preferences is not None:
        direction = _of_preferences(screen, arguments, method, settings, length)
        if direction is not None:
            _write(screen, direction, arguments)
        return
    corpus = noted_corpus(screen, arguments)
    autoencoders = _autoencoders(arguments)
    pair = arguments.source, arguments.target
    checked_method(arguments.method, corpus, pair, arguments.winsorise, settings, autoencoders)
    if arguments.dry_run:
        from cli.dry_run import dry_run_of_text
        from editing.directions.estimation import keeps_texts
        from editing.pipeline.needs import direction_need
        from neurons.text.token_budget import DIRECTIONS

        keeps = keeps_texts(method, arguments.tokens, **length)
        need = partial(
            direction_need, autoencoders=autoencoders, keeps=keeps, all_languages=method.all_languages
        )
        dry_run_of_text(screen, arguments, corpus, need, DIRECTIONS.tokens)
        return
    loaded = loaded_model(screen, arguments)
    with screen.progress("Recording the direction", None, "tokens") as advance:
        direction = direction_of(
            loaded,
            corpus,
            *pair,
            arguments.method,
            tokens=arguments.tokens,
            settings=settings,
            autoencoders=autoencoders,
            progress=advance,
            **length,
        )
    _write(screen, direction, arguments)


def _of_preferences(
    screen: Screen,
    arguments: SimpleNamespace,
    method: type[DirectionMethod],
    settings: dict[str, Any],
    length: dict[str, Any],
) -> Direction | None:
    """The direction; None with --dry-run."""
    from editing.directions.estimation import checked_method, direction_of_preferences
    from neurons.text.preferences import CHOSEN, REJECTED, read_preferences

    preferences = read_preferences(arguments.preferences)
    pair = arguments.source or REJECTED, arguments.target or CHOSEN
    checked_method(arguments.method, None, pair, arguments.winsorise, settings)
    if arguments.dry_run:
        from cli.dry_run import dry_run
        from editing.pipeline.needs import preference_needs

        dry_run(screen, arguments, lambda planned: preference_needs(planned, preferences, method))
        return None
    loaded = loaded_model(screen, arguments)
    with screen.progress("Reading preferences", None, "rows") as advance:
        return direction_of_preferences(
            loaded,
            preferences,
            arguments.method,
            *pair,
            settings=settings,
            progress=advance,
            **length,
        )


def _write(screen: Screen, direction: Direction, arguments: SimpleNamespace) -> None:
    from neurons.models.processes import is_first
    from neurons.text.token_budget import DIRECTIONS

    if not is_first():
        return
    direction.save(arguments.out)
    read_table(screen, direction.metadata["read"], DIRECTIONS.minimum)
    norms = direction_table(screen, direction)
    screen.result(
        out=arguments.out, source=direction.source, target=direction.target, norms=norms, **direction.metadata
    )


def _convert(screen: Screen, arguments: SimpleNamespace) -> None:
    from editing.directions.control_vectors import write_control_vectors
    from editing.directions.direction import load_direction
    from editing.directions.vllm_hook import write_hook_vector
    from neurons.errors import UsageError

    if arguments.out is None:
        raise UsageError("--out is missing: give the file for the vectors (.gguf or .pt)")
    opt.refuse_options(
        arguments, vars(arguments).keys() - {"convert", "layer", "out", "as_json"}, "--convert"
    )
    if (arguments.out.suffix == ".pt") != (arguments.layer is not None):
        raise UsageError(
            "--layer is the layer of a vector for vLLM-Hook: give both --layer and an --out of .pt"
        )
    if arguments.layer is not None:
        config = write_hook_vector(load_direction(arguments.convert), arguments.layer, arguments.out)
        screen.say(f"configuration for vLLM-Hook: {config}")
        screen.result(out=arguments.out, layers=[arguments.layer], config=config)
        return
    layers = write_control_vectors(load_direction(arguments.convert), arguments.out)
    screen.result(out=arguments.out, layers=layers)


def _require(arguments: SimpleNamespace) -> None:
    from neurons.errors import UsageError

    needed = [
        ("corpus", "a directory of <language>.txt"),
        ("source", "the language to steer from"),
        ("target", "the language to steer to"),
        ("out", "the file for the direction"),
    ]
    if arguments.preferences is not None:
        of_text = {"corpus", "languages", "part", "roles", "tokens", "saes", "sae_layers"}
        opt.refuse_options(arguments, of_text, "--preferences")
        needed = needed[3:]
    for name, description in needed:
        if getattr(arguments, name) is None:
            raise UsageError(f"--{name} is missing: give {description}")
    if arguments.model is None:
        raise UsageError("MODEL is missing: give a hub id or a directory")
    if arguments.out.suffix in (".gguf", ".pt"):
        raise UsageError(
            f"{arguments.out}: a direction is a .safetensors, which --convert turns into vectors (.gguf or .pt)"
        )
    if arguments.layer is not None:
        raise UsageError("--layer is only for --convert: leave it out")


def _autoencoders(arguments: SimpleNamespace) -> list[Autoencoder]:
    from editing.directions.sae_files import read_autoencoder
    from neurons.errors import UsageError

    if arguments.sae_layers and len(arguments.sae_layers) != len(arguments.saes):
        raise UsageError(
            f"{len(arguments.saes)} --sae and {len(arguments.sae_layers)} --sae-layer: give one layer for each "
            "autoencoder, or none"
        )
    layers = arguments.sae_layers or [None] * len(arguments.saes)
    return [read_autoencoder(path, layer) for path, layer in zip(arguments.saes, layers, strict=True)]
