"""``broca sae``: sparse autoencoders of a model's residual stream, for ``broca direction``."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import click

from cli import options as opt
from cli.corpora import noted_corpus, read_table
from cli.loading import loaded_model
from cli.screen import Screen


@click.command("sae")
@opt.model
@opt.corpus
@click.option(
    "--layers", required=True, help="Layers after which the residual stream is read, as 1-3 or 1,2,5."
)
@opt.count("--features", "Features of an autoencoder.", 1024)
@opt.count(
    "--states", "Tokens to train on, in equal parts of each language; all layers' are kept in memory.", 5000
)
@opt.count("--epochs", "Passes over these tokens.", 150)
@click.option(
    "--l1",
    type=opt.FiniteRange(min=0),
    default=5e-3,
    show_default=True,
    help="Penalty on active features; larger is sparser.",
)
@click.option(
    "--rate",
    type=opt.FiniteRange(min=0, min_open=True),
    default=5e-4,
    show_default=True,
    help="Adam's learning rate.",
)
@opt.seed("Seed of the sample and of the training.")
@opt.tokens
@opt.device
@opt.dry_run
@opt.quantised
@opt.out("Directory for the autoencoders, each in a directory layer_<number> of it.", directory=True)
@click.option("--overwrite", is_flag=True, help="Replace existing autoencoders.")
@opt.json
def command(**options: Any) -> None:
    """Train a sparse autoencoder on the residual stream after each of some layers of MODEL (hub id or directory).

    Inputs are divided by their length.  The files are in SAE-Lens's format, which `broca direction` reads.

    \b
    Example:
      broca sae artifacts/demo/model --corpus artifacts/demo/corpus --layers 2-4 --out saes
      broca direction artifacts/demo/model --corpus artifacts/demo/corpus --source en --target fr \\
          --method sae-shift --sae saes/layer_2 --sae saes/layer_3 --sae saes/layer_4 --out direction.safetensors
    """
    from dataclasses import asdict, replace

    from editing.checkpoints.staging import check_target, staging
    from editing.directions.sae_files import CONFIG, write_autoencoder
    from editing.directions.sae_recording import sampled_states
    from editing.directions.sae_training import SaeTraining, train_autoencoder
    from neurons.scorers.selection import parse_layers
    from neurons.text.batches import language_batches
    from neurons.text.token_budget import DIRECTIONS, text_read

    arguments = SimpleNamespace(**options)
    screen = Screen(arguments.as_json)
    corpus = noted_corpus(screen, arguments, 1)
    layers = parse_layers(arguments.layers)
    training = SaeTraining(arguments.features, arguments.l1, arguments.rate, arguments.epochs, arguments.seed)
    if arguments.dry_run:
        from cli.dry_run import dry_run_of_text
        from editing.pipeline.needs import sae_need

        sizes = {"layers": len(layers), "states": arguments.states, "features": arguments.features}
        dry_run_of_text(screen, arguments, corpus, partial(sae_need, **sizes), DIRECTIONS.tokens)
        return
    places = {layer: (arguments.out / f"layer_{layer}").resolve() for layer in layers}
    for place in places.values():
        check_target(place, arguments.overwrite, CONFIG)
    loaded = loaded_model(screen, arguments)
    parse_layers(arguments.layers, loaded.anatomy.layers)
    batches = language_batches(loaded, corpus, arguments.tokens, default=DIRECTIONS.tokens)
    read = text_read(corpus, batches)
    metadata = {
        "model_name": loaded.label,
        "corpus": corpus.provenance,
        "read": read,
        "training": asdict(training),
        **loaded.provenance,
    }
    with screen.progress("Reading states", None, "tokens") as advance:
        states = sampled_states(loaded, batches, layers, arguments.states, training.seed, advance)
    results = {}
    with screen.progress("Training", len(layers) * training.epochs, "epochs") as advance:
        for (layer, place), of_layer in zip(places.items(), states, strict=True):
            sae, figures = train_autoencoder(of_layer.to(loaded.device), layer, training, advance)
            sae = replace(sae, fingerprint=loaded.fingerprint)
            with staging(place, arguments.overwrite) as folder:
                write_autoencoder(folder, sae, {**metadata, "figures": asdict(figures)})
            results[layer] = {"out": arguments.out / place.name, **asdict(figures)}
    read_table(screen, read, DIRECTIONS.minimum)
    names = ("states", "unexplained", "active", "dead")
    screen.table(
        f"autoencoders of {training.features} features, on states they were not trained on",
        ["layer", *names],
        [[str(layer), *(of_layer[name] for name in names)] for layer, of_layer in results.items()],
    )
    screen.result(out=arguments.out, layers=results, read=read)
