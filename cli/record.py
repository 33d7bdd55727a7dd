"""``broca record``: one pass over the text, kept as statistics that any method can be computed from."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import click

from cli.corpora import read, tell_read
from cli.loading import announced
from cli.options import (
    CommaSeparated,
    bits_asked,
    corpus_options,
    device_options,
    dry_run_option,
    json_option,
    model_argument,
    out_option,
    quantised_options,
    tokens_option,
)
from cli.screen import Screen

DEFAULT = ("lape", "lape-general", "random-matched")


@click.command("record")
@model_argument
@corpus_options
@click.option(
    "--for",
    "methods",
    type=CommaSeparated(),
    default=DEFAULT,
    help="Methods of `broca identify --method list` to record for, in one pass; all: every one that reads text.  "
    f"[default: {','.join(DEFAULT)}]",
)
@tokens_option
@click.option(
    "--block",
    type=int,
    help="Tokens a block, where no method reads single texts.  [default: the model's context, at most 2048, with gradients 512]",
)
@click.option(
    "--batch-tokens", type=click.IntRange(min=1), help="Tokens read at once.  [default: what memory allows]"
)
@device_options
@dry_run_option
@quantised_options
@out_option("File for the statistics (.safetensors).")
@json_option
def command(**options: Any) -> None:
    """Record what MODEL (hub id or directory) does with the text of a corpus.

    It takes about as long as a forward pass over the text, three times that with gradient methods.  The file
    has 8 bytes a neuron, language and moment, whatever the amount of text; average-precision and momentum add
    4 bytes a neuron and text, so give them few.

    A run that is stopped goes on where it was when the same command is given again.  Under
    `accelerate launch --num-processes N -m cli.main record ...` the text is shared by N processes.

    \b
    Example:
      broca record artifacts/demo/model --corpus artifacts/demo/corpus --out statistics.safetensors
      broca identify --statistics statistics.safetensors --method lape --out neurons.safetensors
    """
    from neurons.models.processes import is_first
    from neurons.models.source import load_model
    from neurons.recording.corpus_recording import record_corpus, remove_unfinished
    from neurons.scorers.method import NOTHING, PROMPTS
    from neurons.scorers.registry import METHODS, moments_of
    from neurons.text.token_budget import budget_of

    asked = SimpleNamespace(**options)
    screen = Screen(asked.as_json)
    readable = [name for name, method in METHODS.items() if method.reads not in (NOTHING, PROMPTS)]
    names = (*readable, "random-matched") if asked.methods == ("all",) else asked.methods
    moments, reads = moments_of(tuple(names))
    corpus = read(screen, asked.corpus_path, asked.languages, asked.part)
    if asked.dry_run:
        from cli.dry_run import dry_run_of_text
        from neurons.recording.needs import recording_need

        dry_run_of_text(
            screen, asked, corpus, partial(recording_need, moments=moments, reads=reads, block=asked.block)
        )
        return
    loaded = announced(screen, load_model(asked.model, asked.device, asked.dtype, bits=bits_asked(asked)))
    with screen.progress("Recording", None, "tokens") as advance:
        statistics = record_corpus(
            loaded,
            corpus,
            moments,
            reads,
            asked.tokens,
            asked.block,
            asked.batch_tokens,
            advance,
            asked.out,
        )
    if not is_first():
        return
    statistics.save(asked.out)
    remove_unfinished(asked.out)
    tell_read(screen, statistics.metadata["corpora"][-1]["read"], budget_of(moments, reads).minimum)
    in_blocks = [name for name in names if METHODS[name].reads not in (reads, NOTHING)]
    if in_blocks:
        screen.say(
            f"read text by text for all methods; {', '.join(in_blocks)} alone would read it joined into full blocks"
        )
    for language, share in statistics.metadata["unknown"].items():
        screen.warn(f"the tokenizer does not know {share:.0%} of the tokens of {language!r}")
    screen.table(
        f"statistics of {statistics.metadata['model']}, {reads} of text",
        ["language", "tokens", reads],
        [
            [language, int(tokens), int(texts)]
            for language, tokens, texts in zip(
                statistics.languages, statistics.tokens, statistics.texts, strict=True
            )
        ],
    )
    screen.say("holds " + ", ".join([*statistics.moments, *(["responses"] if statistics.responses else [])]))
    screen.result(
        {
            "out": asked.out,
            "fingerprint": statistics.fingerprint,
            "tokens": dict(zip(statistics.languages, statistics.tokens.tolist(), strict=True)),
            "texts": dict(zip(statistics.languages, statistics.texts.tolist(), strict=True)),
            "moments": list(statistics.moments),
            "responses": bool(statistics.responses),
            "settings": statistics.metadata["settings"],
            "read": statistics.metadata["corpora"][-1]["read"],
        },
        asked.out,
    )
