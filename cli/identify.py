"""``broca identify``: which neurons carry which language."""

from __future__ import annotations

from pathlib import Path

import click

from cli.options import corpus_options, device_options, json_option, model_argument, out_option
from cli.screen import Screen


@click.command("identify")
@model_argument
@corpus_options
@click.option(
    "--method",
    type=click.Choice(["lape", "gradient-contrast"]),
    default="lape",
    show_default=True,
    help="lape: activation probability entropy (arXiv 2402.16438); gradient-contrast: contrastive "
    "gradient x activation, for small or densely firing models.",
)
@click.option(
    "--top-rate",
    type=float,
    default=0.01,
    show_default=True,
    help="Share of all neurons kept: of all languages together (lape) or for each (gradient-contrast).",
)
@click.option("--tokens", type=click.IntRange(min=1), help="Most tokens a language.  [default: all]")
@click.option("--block", type=int, help="Tokens a block.  [default: the model's context, at most 2048]")
@device_options
@out_option("File for the neuron set (.safetensors).")
@json_option
def command(
    model: str,
    corpus_path: Path,
    languages: tuple[str, ...] | None,
    part: str,
    method: str,
    top_rate: float,
    tokens: int | None,
    block: int | None,
    device: str,
    dtype: str,
    out: Path,
    as_json: bool,
) -> None:
    """Find the neurons of MODEL (hub id or directory) that carry each language of a corpus.

    \b
    Example:
      broca identify artifacts/demo/model --corpus artifacts/demo/corpus --out neurons.safetensors
    """
    from neurons.corpus import read_corpus
    from neurons.identify import identify
    from neurons.source import load_model

    screen = Screen(as_json)
    corpus = read_corpus(corpus_path, languages, part)
    loaded = load_model(model, device, dtype)
    with screen.progress("Recording activations", None, "tokens") as advance:
        found = identify(loaded, corpus, method, top_rate, tokens, block, advance)
    found.save(out)
    counts = {language: [len(rows) for rows in found.by_layer(language)] for language in found.languages}
    screen.table(
        f"{method}: neurons of {found.layers} x {found.neurons}",
        ["language", "tokens", "neurons", *(f"layer {i}" for i in range(found.layers))]
        if found.layers <= 12
        else ["language", "tokens", "neurons"],
        [
            [language, found.metadata["tokens"][language], sum(layers)]
            + (layers if found.layers <= 12 else [])
            for language, layers in counts.items()
        ],
    )
    if found.empty_languages:
        screen.warn(
            f"{method} found no neuron for {', '.join(found.empty_languages)}: "
            + (
                "no neuron of theirs passes the published thresholds; try --method gradient-contrast"
                if method == "lape"
                else "raise --top-rate"
            )
        )
    screen.result(
        {
            "out": out,
            "method": method,
            "fingerprint": found.metadata["fingerprint"],
            "tokens": found.metadata["tokens"],
            "neurons": {language: sum(layers) for language, layers in counts.items()},
            "by_layer": counts,
            "empty": list(found.empty_languages),
        },
        out,
    )
