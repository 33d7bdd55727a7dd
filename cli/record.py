"""``broca record``: statistics from one pass over the text, for all methods."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import click

from cli import options as opt
from cli.corpora import noted_corpus, read_table
from cli.loading import loaded_model
from cli.screen import Screen

DEFAULT = ("lape", "lape-general", "random-matched")


@click.command("record")
@opt.model
@opt.corpus
@click.option(
    "--for",
    "methods",
    type=opt.CommaSeparated(),
    default=DEFAULT,
    help="Methods of `broca identify --method list` to record for; all: every method that reads text.  "
    f"[default: {','.join(DEFAULT)}]",
)
@opt.tokens
@click.option(
    "--block",
    type=int,
    help="Tokens per block, if no method reads single texts.  [default: the model's context, at most 2048, or 512 with gradients]",
)
@opt.batch_tokens
@opt.device
@opt.dry_run
@opt.quantised
@opt.out("File for the statistics (.safetensors).")
@opt.json
def command(**options: Any) -> None:
    """Record activation statistics of MODEL (hub id or directory) on the text of a corpus.

    It takes about as long as a forward pass over the text, and three times as long with gradient methods.  The output
    has 8 bytes per neuron, language and moment for any amount of text; average-precision and momentum add 4 bytes per
    neuron and text.

    The same command resumes an interrupted run.  With `accelerate launch --num-processes N -m cli.main record ...`,
    N processes share the text.

    \b
    Example:
      broca record artifacts/demo/model --corpus artifacts/demo/corpus --out statistics.safetensors
      broca identify --statistics statistics.safetensors --method lape --out neurons.safetensors
    """
    from neurons.models.processes import is_first
    from neurons.recording.corpus_recording import record_corpus, remove_unfinished
    from neurons.scorers.method import NOTHING
    from neurons.scorers.registry import METHODS, moments_of
    from neurons.text.token_budget import budget_of

    arguments = SimpleNamespace(**options)
    screen = Screen(arguments.as_json)
    readable = [name for name, method in METHODS.items() if method.records()]
    names = (*readable, "random-matched") if arguments.methods == ("all",) else arguments.methods
    moments, reads = moments_of(tuple(names))
    corpus = noted_corpus(screen, arguments)
    if arguments.dry_run:
        from cli.dry_run import dry_run_of_text
        from neurons.recording.needs import recording_need

        dry_run_of_text(
            screen,
            arguments,
            corpus,
            partial(
                recording_need,
                moments=moments,
                reads=reads,
                block=arguments.block,
                batch_tokens=arguments.batch_tokens,
            ),
            budget_of(moments, reads).tokens,
        )
        return
    loaded = loaded_model(screen, arguments)
    with screen.progress("Recording", None, "tokens") as advance:
        statistics = record_corpus(
            loaded,
            corpus,
            moments,
            reads,
            arguments.tokens,
            arguments.block,
            arguments.batch_tokens,
            advance,
            arguments.out,
        )
    if not is_first():
        return
    statistics.save(arguments.out)
    remove_unfinished(arguments.out)
    read_table(screen, statistics.metadata["corpora"][-1]["read"], budget_of(moments, reads).minimum)
    in_blocks = [name for name in names if METHODS[name].reads not in (reads, NOTHING)]
    if in_blocks:
        screen.say(f"all methods read single texts; recorded alone, {', '.join(in_blocks)} reads full blocks")
    for language, fraction in statistics.metadata["unknown"].items():
        screen.warn(f"{fraction:.0%} of the tokens of {language!r} are unknown to the tokenizer")
    read_as = statistics.metadata["settings"]["reads"]
    tokens = dict(zip(statistics.languages, statistics.tokens.tolist(), strict=True))
    texts = dict(zip(statistics.languages, statistics.texts.tolist(), strict=True))
    screen.table(
        f"statistics of {statistics.metadata['model']}, {read_as} of text",
        ["language", "tokens", read_as],
        [[language, tokens[language], texts[language]] for language in statistics.languages],
    )
    screen.say(
        "moments: " + ", ".join([*statistics.moments, *(["responses"] if statistics.responses else [])])
    )
    screen.result(
        out=arguments.out,
        fingerprint=statistics.fingerprint,
        tokens=tokens,
        texts=texts,
        moments=list(statistics.moments),
        responses=bool(statistics.responses),
        settings=statistics.metadata["settings"],
        read=statistics.metadata["corpora"][-1]["read"],
    )
