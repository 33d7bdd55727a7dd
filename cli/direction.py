"""``broca direction``: from one language to another."""

from __future__ import annotations

from pathlib import Path

import click

from cli.options import corpus_options, device_options, json_option, model_argument, out_option
from cli.screen import Screen


@click.command("direction")
@model_argument
@corpus_options
@click.option("--source", required=True, help="Language to steer from.")
@click.option("--target", required=True, help="Language to steer to.")
@device_options
@out_option("File for the direction (.safetensors).")
@json_option
def command(
    model: str,
    corpus_path: Path,
    languages: tuple[str, ...] | None,
    part: str,
    source: str,
    target: str,
    device: str,
    dtype: str,
    out: Path,
    as_json: bool,
) -> None:
    """Take the DiffMean direction from one language to another in MODEL (hub id or directory).

    \b
    Example:
      broca direction artifacts/demo/model --corpus artifacts/demo/corpus --source en --target fr \\
          --out direction.safetensors
    """
    from editing.directions.diffmean import diffmean_direction
    from neurons.corpus import read_corpus
    from neurons.source import load_model

    screen = Screen(as_json)
    corpus = read_corpus(corpus_path, languages, part)
    loaded = load_model(model, device, dtype)
    with screen.progress("Recording the direction", None, "tokens") as advance:
        found = diffmean_direction(loaded, corpus, source, target, advance)
    found.save(out)
    norms = {site: vectors.norm(dim=1).tolist() for site, vectors in found.vectors.items()}
    screen.table(
        f"DiffMean, {source} to {target}: length of the direction",
        ["layer", *norms],
        [[str(layer), *values] for layer, values in enumerate(zip(*norms.values(), strict=True))],
    )
    screen.result({"out": out, "source": source, "target": target, "norms": norms, **found.metadata}, out)
