"""``broca tune``: search for the best edit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli.command_line import command_line, loaded_as
from cli.corpora import tell, tell_read
from cli.loading import announced
from cli.options import (
    IN_DIRECTORY,
    LANGUAGE,
    CommaSeparated,
    FiniteRange,
    device_options,
    dry_run_option,
    json_option,
    model_argument,
    out_option,
    tokens_option,
)
from cli.screen import Screen

if TYPE_CHECKING:
    from editing.plans.plan import Plan
    from editing.study.search_result import Reported, SearchResult
    from editing.study.trial import Goals
    from neurons.models.memory import Need
    from neurons.models.source import LoadedModel
    from neurons.text.corpus import Corpus

PARTS = ("estimate", "choose", "report")
RESULT, PLAN = "tune.json", "edit.safetensors"
SAMPLES = 2  # continuations a prompt; of what is reported, at least


@click.command("tune")
@model_argument
@click.option(
    "--corpus",
    "corpus_path",
    type=IN_DIRECTORY,
    required=True,
    help="Directory of <language>.txt, .jsonl or .parquet of source, target and at least one more language.",
)
@click.option("--languages", type=CommaSeparated(), help="Which of the corpus, as en,fr,de.  [default: all]")
@click.option("--source", type=LANGUAGE, required=True, help="Language of the prompts.")
@click.option("--target", type=LANGUAGE, required=True, help="Language that the answers are to be in.")
@click.option(
    "--methods",
    type=CommaSeparated(),
    default="keyed",
    show_default=True,
    help="Of the permanent methods of `broca edit --method list`; several are searched together.",
)
@click.option("--layers", help="Layers that may change, as 1-3 or 1,2,5.  [default: all]")
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=40,
    show_default=True,
    help="Edits to try, earlier runs included.",
)
@click.option(
    "--prompts", type=click.IntRange(min=1), default=50, show_default=True, help="At most so many a trial."
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    help="Continuations a prompt.  [default: 2; 1 at temperature 0]",
)
@click.option(
    "--lines",
    type=click.IntRange(min=1),
    default=25,
    show_default=True,
    help="Of each third language, read in a trial.",
)
@click.option("--new-tokens", type=click.IntRange(min=1), default=40, show_default=True)
@click.option("--temperature", type=FiniteRange(min=0), default=0.7, show_default=True)
@click.option(
    "--goal-share", type=FiniteRange(min=0, min_open=True), default=0.95, show_default=True,
    help="Of what the model reaches on target prompts, at least.",
)  # fmt: skip
@click.option(
    "--goal-gap", type=FiniteRange(min=0, min_open=True), default=0.3, show_default=True,
    help="Fluency gap, nats a token, at most.",
)  # fmt: skip
@click.option(
    "--goal-rise", type=FiniteRange(min=0, min_open=True), default=0.05, show_default=True,
    help="NLL rise of any third language, nats a token, at most.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@tokens_option
@device_options
@dry_run_option
@out_option("Directory of the results; a search that was stopped goes on there.", directory=True)
@json_option
def command(**options: Any) -> None:
    """Search for the edit of MODEL that steers best at the least harm.

    The direction is taken from one half of the text, edits are tried on a quarter, and the chosen one is
    reported on the last quarter.  A trial takes as long as --prompts times --samples continuations of
    --new-tokens tokens; hopeless ones are given up early.  The disk holds plans, pictures and numbers, no
    checkpoint.  Ctrl-C ends the search with what it has found so far; the same command goes on.

    \b
    Example:
      broca tune artifacts/demo/model --corpus artifacts/demo/corpus \\
          --source en --target fr --out tuned
    """
    from editing.directions.diffmean import diffmean_direction
    from editing.evaluation.generation import check_samples
    from editing.evaluation.language_id import check_languages
    from editing.methods.material import Material
    from editing.plans.applied import applied
    from editing.study.provenance import measured_by, processor, texts_read
    from editing.study.registry import searched_named
    from editing.study.search import STUDY, Search
    from editing.study.search_report import choose, confirmed, front, front_figure
    from editing.study.search_result import SearchResult, search_document
    from editing.study.search_scoring import Scoring, third_languages
    from editing.study.search_space import spaces
    from editing.study.trial import Goals
    from neurons.files.artifact import json_bytes, write_atomically
    from neurons.models.source import load_model
    from neurons.neuron_sets.pictures import FORMATS, save_figure
    from neurons.scorers.selection import parse_layers
    from neurons.text.corpus import read_corpus
    from neurons.text.token_budget import DIRECTIONS

    asked = SimpleNamespace(**options)
    screen = Screen(asked.as_json)
    if asked.samples is None:
        asked.samples = 1 if asked.temperature == 0 else SAMPLES
    check_samples(asked.samples, asked.temperature)
    searched_named(asked.methods)
    _require_own_directory(asked.out, STUDY)
    corpora = {
        part: replace(read_corpus(asked.corpus_path, asked.languages, part), tokens=asked.tokens)
        for part in PARTS
    }
    tell(screen, asked.corpus_path, asked.languages)
    third_languages(corpora["choose"], asked.source, asked.target)
    check_languages(corpora["choose"].languages)
    if asked.dry_run:
        _dry_run(screen, asked, corpora)
        return
    loaded = announced(screen, load_model(asked.model, asked.device, asked.dtype))
    layers = None if asked.layers is None else parse_layers(asked.layers, loaded.anatomy.layers)
    goals = Goals(asked.goal_share, asked.goal_gap, asked.goal_rise)
    with screen.progress("Reading", None, "tokens") as advance:
        direction = diffmean_direction(loaded, corpora["estimate"], asked.source, asked.target, advance)
    tell_read(screen, direction.metadata["read"], DIRECTIONS.minimum, "text that the direction is from")
    material = Material(
        loaded, corpora["estimate"], asked.source, asked.target, directions=(direction,), layers=layers
    )
    found = spaces(material, asked.methods)
    scoring = Scoring(
        loaded,
        corpora["choose"],
        asked.source,
        asked.target,
        prompts=asked.prompts,
        samples=asked.samples,
        lines=asked.lines,
        seed=asked.seed,
        new_tokens=asked.new_tokens,
        temperature=asked.temperature,
    )
    search = Search(
        scoring,
        found,
        partial(applied, loaded),
        asked.out / STUDY,
        _identity(asked, loaded, corpora, {name: space.as_json() for name, space in found.items()}),
        goals,
        asked.seed,
    )
    already = len(search.trials)
    if already:
        screen.stage("search", f"{already} trials of an earlier run are kept")
    with screen.progress("Searching", asked.trials, "trials") as advance:
        advance(min(already, asked.trials))
        ended = search.run(asked.trials, lambda trial: advance(1))
    if not search.trials:
        raise click.exceptions.Abort
    if ended:
        screen.stage("confirm", "...")
    # Without sampling, another seed writes the same again.
    seeds = [] if asked.temperature == 0 else [asked.seed + 1, asked.seed + 2]
    trials = confirmed(search, seeds=seeds) if ended else search.trials
    choice = choose(trials, goals, scoring.ceiling)
    plan = search.plan(choice.trial)
    result = SearchResult(
        source=asked.source,
        target=asked.target,
        goals=goals,
        ceiling=scoring.ceiling,
        trials=tuple(trials),
        front=tuple(trial.number for trial in front(trials)),
        chosen=choice.trial.number,
        chosen_meets_goals=choice.met,
        why=choice.why,
        report=_reported(screen, asked, loaded, corpora["report"], plan, goals) if ended else None,
        finished=ended,
        about={
            "identity": search.identity,
            "edit": PLAN,
            "model": loaded.label,
            "fingerprint": loaded.fingerprint,
            "corpora": texts_read(corpora.values()),
            "packages": measured_by("optuna"),
            "processor": processor(loaded.device),
            "command": command_line(
                languages=asked.languages or corpora["report"].languages,
                samples=asked.samples,
                **loaded_as(loaded),
            ),
        },
    )
    plan.save(asked.out / PLAN)
    figure = front_figure(result)
    for kind in FORMATS:
        save_figure(figure, asked.out / f"front.{kind}")
    write_atomically(asked.out / RESULT, json_bytes(search_document(result)))
    _show(screen, result, asked.out)
    if not ended:
        raise click.exceptions.Abort


def _dry_run(screen: Screen, asked: SimpleNamespace, corpora: dict[str, Corpus]) -> None:
    from cli.dry_run import dry_run
    from editing.pipeline.needs import direction_need, evaluation_need, key_need
    from neurons.recording.needs import text_of

    def needs(planned: LoadedModel) -> list[Need]:
        text = {part: text_of(planned, corpora[part]) for part in ("estimate", "report")}
        keys = [key_need(planned, text["estimate"])] if {"keyed", "bake"} & {*asked.methods} else []
        return [direction_need(planned, text["estimate"]), *keys, evaluation_need(planned, text["report"])]

    dry_run(screen, asked.model, asked.device, asked.dtype, needs)


def _require_own_directory(out: Path, study: str) -> None:
    from neurons.errors import BrocaError

    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / study).is_file())):
        raise BrocaError(f"{out}: exists and is not the directory of an earlier search: choose another --out")


def _identity(
    asked: SimpleNamespace, loaded: LoadedModel, corpora: dict[str, Corpus], knobs: dict[str, Any]
) -> dict[str, Any]:
    """All that decides what a trial measures; keys are what a refusal calls them."""
    return {
        "model": loaded.fingerprint,
        "corpus": {part: corpus.digest for part, corpus in corpora.items()},
        "source": asked.source,
        "target": asked.target,
        "methods": list(asked.methods),
        "layers": asked.layers,
        "knobs": knobs,
        "prompts": asked.prompts,
        "samples": asked.samples,
        "lines": asked.lines,
        "new tokens": asked.new_tokens,
        "temperature": asked.temperature,
        "goals": [asked.goal_share, asked.goal_gap, asked.goal_rise],
        "seed": asked.seed,
        "device": str(loaded.device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }


def _reported(
    screen: Screen, asked: SimpleNamespace, loaded: LoadedModel, corpus: Corpus, plan: Plan, goals: Goals
) -> Reported:
    """The unedited and the edited model on text that nothing was chosen on."""
    from editing.evaluation.evaluation import Evaluation
    from editing.plans.applied import applied
    from editing.study.search_report import goals_met
    from editing.study.search_result import Reported

    with screen.progress("Reporting", 2, "models") as advance:
        evaluation = Evaluation(
            loaded,
            corpus,
            asked.source,
            asked.target,
            samples=asked.samples if asked.temperature == 0 else max(asked.samples, SAMPLES),
            max_prompts=asked.prompts,
            seed=asked.seed,
            new_tokens=asked.new_tokens,
            temperature=asked.temperature,
        )
        advance(1)
        details = {
            "settings": plan.metadata["settings"],
            "components": plan.components,
            "relative_change": plan.relative_change(),
        }
        edited = evaluation.measure("tuned edit", partial(applied, loaded, plan), details, kl=True)
        advance(1)
    met = goals_met(edited, evaluation.ceiling, asked.source, asked.target, goals)
    return Reported(evaluation.ceiling, evaluation.continuations, met, (evaluation.base, edited))


def _show(screen: Screen, search: SearchResult, out: Path) -> None:
    from cli.tables import report_table, say_samples
    from editing.study.search_report import COLUMNS, rows
    from editing.study.search_result import search_document

    early = sum(trial.state != "measured" for trial in search.trials)
    screen.table(
        f"front of {len(search.trials)} edits ({early} not measured in full), on the part that edits are chosen on",
        COLUMNS,
        rows(search),
        words=3,
    )
    screen.say(f"* trial {search.chosen}: {search.why}")
    report = search.result
    if report is None or search.report is None:
        screen.say("the search was stopped, so nothing is reported: the same command goes on")
    else:
        report_table(screen, report)
        missed = [name for name, met in search.report.goals_met.items() if not met]
        screen.say(f"goals on this part: {'not met: ' + ', '.join(missed) if missed else 'all met'}")
        say_samples(screen, report.outcomes[-1])
    screen.say(f"all trials and front: {out / RESULT} {out / 'front.png'}")
    screen.result({"out": out, **search_document(search)}, out / PLAN)
