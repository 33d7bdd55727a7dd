"""``broca neuron``: a report on one neuron."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli import options as opt
from cli.corpora import noted_corpus
from cli.loading import loaded_model
from cli.screen import Screen, one_line

if TYPE_CHECKING:
    from neurons.neuron_sets.neuron_report import NeuronReport


@click.command("neuron")
@opt.model
@click.argument("layer", type=int)
@click.argument("neuron", type=int)
@opt.corpus
@opt.count("--snippets", "Number of text snippets to show.", 10, minimum=0)
@opt.count("--top", "Number of promoted and of suppressed tokens to show.", 10)
@opt.tokens
@opt.device
@opt.json
def command(**options: Any) -> None:
    """Report on neuron NEURON of layer LAYER of MODEL (hub id or directory), both counted from 0.

    The report has the text where it is most active, the tokens that it promotes and suppresses (logit lens), and its
    activity in each language.

    \b
    Example:
      broca neuron artifacts/demo/model 5 42 --corpus artifacts/demo/corpus
    """
    from neurons.neuron_sets.neuron_report import neuron_report

    arguments = SimpleNamespace(**options)
    screen = Screen(arguments.as_json)
    corpus = noted_corpus(screen, arguments, 1)
    loaded = loaded_model(screen, arguments)
    with screen.progress("Reading", None, "tokens") as advance:
        report = neuron_report(
            loaded,
            corpus,
            arguments.layer,
            arguments.neuron,
            arguments.snippets,
            arguments.top,
            arguments.tokens,
            advance,
        )
    _show(screen, report)
    screen.result(
        **asdict(report),
        model=loaded.label,
        fingerprint=loaded.fingerprint,
        residual_output=loaded.anatomy.residual_output,
        corpus=corpus.provenance,
    )
    if not loaded.anatomy.residual_output:
        screen.warn(
            "a norm or a factor follows the MLP of this model: the promoted and suppressed tokens are approximate"
        )


def _show(screen: Screen, report: NeuronReport) -> None:
    screen.table(
        f"layer {report.layer}, neuron {report.neuron}: activity (norm of its value {report.value_norm:.4g})",
        ["language", "tokens", "fires", "mean", "mean |value|", "minimum", "maximum"],
        [[language, *asdict(activity).values()] for language, activity in report.activity.items()],
    )
    screen.table(
        "tokens of the value through final norm and LM head (logits); a negative activation swaps them",
        ["promoted", "logit", "suppressed", "logit"],
        [
            [_visible(promoted), f"{up:+.3f}", _visible(suppressed), f"{down:+.3f}"]
            for (promoted, up), (suppressed, down) in zip(report.promoted, report.suppressed, strict=True)
        ],
    )
    screen.table(
        "most active tokens",
        ["language", "line", "text", "value"],
        [
            [
                snippet.language,
                str(snippet.line + 1),
                one_line(f"{snippet.before}»{snippet.token}«{snippet.after}"),
                f"{snippet.value:+.3f}",
            ]
            for snippet in report.snippets
        ],
        words=3,
    )


def _visible(token: str) -> str:
    """The token, quoted if it begins or ends with whitespace."""
    return repr(token) if token != token.strip() or not token else token
