"""``broca evaluate``: a steered model beside the unedited one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from cli.options import FILE, corpus_options, device_options, json_option, model_argument, out_option
from cli.screen import Screen
from cli.tables import report_table


@click.command("evaluate")
@model_argument
@click.option("--edit", "edit_path", type=FILE, help="A plan, applied in memory.")
@click.option("--against", help="A steered checkpoint of the same architecture: hub id or directory.")
@corpus_options
@click.option("--source", required=True, help="Language of the prompts.")
@click.option("--target", required=True, help="Language that the answers are to be in.")
@click.option(
    "--prompts", type=click.IntRange(min=1), default=100, show_default=True, help="At most so many."
)
@click.option(
    "--samples", type=click.IntRange(min=1), default=1, show_default=True, help="Continuations a prompt."
)
@click.option("--new-tokens", type=click.IntRange(min=1), default=40, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.7, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@device_options
@out_option("File for the numbers (.json).")
@json_option
def command(
    model: str,
    edit_path: Path | None,
    against: str | None,
    corpus_path: Path,
    languages: tuple[str, ...] | None,
    part: str,
    source: str,
    target: str,
    prompts: int,
    samples: int,
    new_tokens: int,
    temperature: float,
    seed: int,
    device: str,
    dtype: str,
    out: Path,
    as_json: bool,
) -> None:
    """Measure MODEL (hub id or directory), and a plan or a steered checkpoint beside it.

    \b
    Example:
      broca evaluate artifacts/demo/model --edit edit.safetensors --corpus artifacts/demo/corpus \\
          --part report --source en --target fr --out report.json
    """
    from editing.evaluation import Evaluation
    from editing.live import applied, exchanged
    from editing.plan import load_plan
    from editing.report import report_from_json
    from neurons.artifact import json_bytes, write_atomically
    from neurons.corpus import read_corpus
    from neurons.errors import UsageError
    from neurons.source import load_model

    screen = Screen(as_json)
    if edit_path is not None and against is not None:
        raise UsageError("--edit and --against are two ways to name the steered model: give one")
    corpus = read_corpus(corpus_path, languages, part)
    plan = None if edit_path is None else load_plan(edit_path)
    loaded = load_model(model, device, dtype)
    if plan is not None:
        loaded.require_fingerprint(plan.metadata, edit_path)
    other = None if against is None else load_model(against, device, dtype)
    with screen.progress("Measuring", 1 if plan is None and other is None else 2, "models") as advance:
        evaluation = Evaluation(
            loaded, corpus, source, target, samples, prompts, seed, new_tokens, temperature
        )
        advance(1)
        outcomes = [evaluation.base]
        if plan is not None:
            details = {"components": plan.components, "relative_change": plan.relative_change()}
            outcomes.append(evaluation.measure("edited", partial(applied, loaded, plan), details, kl=True))
            advance(1)
        elif other is not None:
            outcomes.append(evaluation.measure("against", partial(exchanged, loaded, other), kl=True))
            advance(1)
    value = {
        "model": loaded.label,
        "fingerprint": loaded.fingerprint,
        "edit": edit_path,
        "against": against,
        "corpus": {"digest": corpus.digest, "part": corpus.part, "languages": list(corpus.languages)},
        "settings": {
            "samples": samples,
            "new_tokens": new_tokens,
            "temperature": temperature,
            "seed": seed,
        },
        "source": source,
        "target": target,
        "ceiling": evaluation.ceiling,
        "continuations": evaluation.continuations,
        "outcomes": [outcome.as_json() for outcome in outcomes],
    }
    write_atomically(out, json_bytes(value))
    report_table(screen, report_from_json(value))
    for sample in outcomes[-1].samples[:3]:
        screen.say(f"  {sample['prompt']} | {' '.join(sample['continuation'].split())}")
    screen.result({"out": out, **value}, out)
