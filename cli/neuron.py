"""``broca neuron``: one neuron explained."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli.corpora import read
from cli.loading import announced
from cli.options import corpus_options, device_options, json_option, model_argument, tokens_option
from cli.screen import Screen

if TYPE_CHECKING:
    from neurons.neuron_sets.neuron_report import NeuronReport


@click.command("neuron")
@model_argument
@click.argument("layer", type=int)
@click.argument("neuron", type=int)
@corpus_options
@click.option(
    "--snippets", type=click.IntRange(min=0), default=10, show_default=True, help="Places in text to show."
)
@click.option(
    "--top", type=click.IntRange(min=1), default=10, show_default=True, help="Tokens promoted and suppressed."
)
@tokens_option
@device_options
@json_option
def command(**options: Any) -> None:
    """Explain neuron NEURON of layer LAYER of MODEL (hub id or directory), both counted from 0.

    Shown are the places in the corpus where it is most active, the tokens that its value makes likelier
    and less likely (logit lens), and its activity in each language.

    \b
    Example:
      broca neuron artifacts/demo/model 5 42 --corpus artifacts/demo/corpus
    """
    from neurons.models.source import load_model
    from neurons.neuron_sets.neuron_report import neuron_report

    asked = SimpleNamespace(**options)
    screen = Screen(asked.as_json)
    corpus = read(screen, asked.corpus_path, asked.languages, asked.part, least=1)
    loaded = announced(screen, load_model(asked.model, asked.device, asked.dtype))
    with screen.progress("Reading", None, "tokens") as advance:
        found = neuron_report(
            loaded, corpus, asked.layer, asked.neuron, asked.snippets, asked.top, asked.tokens, advance
        )
    _show(screen, found)
    screen.result(
        {
            **asdict(found),
            "model": loaded.label,
            "fingerprint": loaded.fingerprint,
            "residual_output": loaded.anatomy.residual_output,
            "corpus": {"digest": corpus.digest, "part": corpus.part},
        }
    )
    if not loaded.anatomy.residual_output:
        screen.warn("a norm stands between this neuron and the residual stream: its tokens are approximate")


def _show(screen: Screen, found: NeuronReport) -> None:
    screen.table(
        f"layer {found.layer}, neuron {found.neuron}: activity (length of its value {found.value_norm:.4g})",
        ["language", "tokens", "fires", "mean", "mean |value|", "least", "largest"],
        [[language, *asdict(one).values()] for language, one in found.activity.items()],
    )
    screen.table(
        "tokens by the value through the final norm and the head, logits; a negative activation reverses them",
        ["promoted", "by", "suppressed", "by"],
        [
            [_visible(more), f"{up:+.3f}", _visible(less), f"{down:+.3f}"]
            for (more, up), (less, down) in zip(found.promoted, found.suppressed, strict=True)
        ],
    )
    screen.table(
        "most active at",
        ["language", "line", "text", "value"],
        [
            [
                one.language,
                str(one.line + 1),
                _one_line(f"{one.before}»{one.token}«{one.after}"),
                f"{one.value:+.3f}",
            ]
            for one in found.snippets
        ],
        words=3,
    )


def _visible(token: str) -> str:
    """Spaces and line breaks are tokens too."""
    return repr(token) if token != token.strip() or not token else token


def _one_line(text: str) -> str:
    return " ".join(text.split())
