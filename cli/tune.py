"""``broca tune``: search for the best edit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli import options as opt
from cli.command_line import command_line, loaded_as
from cli.corpora import note_files, read_table
from cli.loading import loaded_model
from cli.screen import Screen

if TYPE_CHECKING:
    from editing.evaluation.classifier import Classifier
    from editing.plans.plan import Plan
    from editing.study.search_result import Reported, SearchResult
    from editing.study.trial import Goals
    from neurons.models.memory import Need
    from neurons.models.source import LoadedModel
    from neurons.text.corpus import Corpus

RESULT, PLAN = "tune.json", "edit.safetensors"
SAMPLES = 2  # continuations per prompt; the minimum for the report


def _goal(name: str, default: float, text: str) -> opt.Decorator:
    positive = opt.FiniteRange(min=0, min_open=True)
    return click.option(f"--goal-{name}", type=positive, default=default, show_default=True, help=text)


@click.command("tune")
@opt.model
@click.option(
    "--corpus",
    type=opt.IN_PATH,
    required=True,
    help="Directory of <language>.txt, .jsonl or .parquet, of source, target and at least one other language.",
)
@opt.languages
@opt.pair
@click.option(
    "--methods",
    type=opt.CommaSeparated(),
    default="keyed",
    show_default=True,
    help="Methods of `broca edit --method list` to search; several are searched together.",
)
@click.option("--layers", help="Layers to edit, as 1-3 or 1,2,5.  [default: all]")
@opt.count("--trials", "Number of edits to try, including earlier runs.", 40)
@opt.count("--prompts", "Maximum number of prompts per trial.", 50)
@opt.count("--samples", "Continuations per prompt.  [default: 2, or 1 at temperature 0]")
@opt.count("--lines", "Lines per third language and trial.", 25)
@opt.writing(40, 0.7)
@_goal("share", 0.95, "Minimum target-language rate, as a fraction of the rate on target prompts.")
@_goal("gap", 0.3, "Maximum fluency gap, in nats a token.")
@_goal("rise", 0.05, "Maximum NLL rise of any third language, in nats a token.")
@opt.classifier
@opt.seed("Seed of the search and the sampling.")
@opt.tokens
@opt.device
@opt.dry_run
@opt.out("Directory of the results, and of an interrupted search to resume.", directory=True)
@opt.json
def command(**options: Any) -> None:
    """Search for the edit of MODEL (hub id or directory) that steers best with the least harm.

    The direction is estimated on half of the text, edits are tried on a quarter, and the chosen edit is reported on
    the last quarter.  A trial takes as long as --prompts times --samples continuations of --new-tokens tokens; poor
    trials stop early.  The output has plans, plots and figures, but no checkpoint.  Ctrl-C ends the search with the
    best edit so far; the same command resumes it.

    \b
    Example:
      broca tune artifacts/demo/model --corpus artifacts/demo/corpus \\
          --source en --target fr --out tuned
    """
    from editing.directions.diffmean import diffmean_direction
    from editing.evaluation.classifier import load_classifier
    from editing.evaluation.generation import check_samples
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
    from neurons.errors import BrocaError
    from neurons.files.artifact import json_bytes, write_atomically
    from neurons.neuron_sets.pictures import FORMATS, save_figure
    from neurons.scorers.selection import parse_layers
    from neurons.text.corpus import read_corpus
    from neurons.text.token_budget import DIRECTIONS

    arguments = SimpleNamespace(**options)
    screen = Screen(arguments.as_json)
    if arguments.samples is None:
        arguments.samples = 1 if arguments.temperature == 0 else SAMPLES
    check_samples(arguments.samples, arguments.temperature)
    searched_named(arguments.methods)
    if arguments.layers is not None:
        parse_layers(arguments.layers)
    out = arguments.out
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / STUDY).is_file())):
        raise BrocaError(f"{out} exists and is not the directory of an earlier search: choose another --out")
    corpora = {
        part: replace(read_corpus(arguments.corpus, arguments.languages, part), tokens=arguments.tokens)
        for part in ("estimate", "choose", "report")
    }
    classifier = load_classifier(arguments.classifier, device=arguments.device)
    note_files(screen, arguments.corpus, arguments.languages, arguments.classifier is not None)
    third_languages(corpora["choose"], arguments.source, arguments.target)
    classifier.require(corpora["choose"].languages)
    for corpus in corpora.values():
        corpus.require_plain(arguments.source, arguments.target)
    if arguments.dry_run:
        _dry_run(screen, arguments, corpora)
        return
    loaded = loaded_model(screen, arguments)
    layers = None if arguments.layers is None else parse_layers(arguments.layers, loaded.anatomy.layers)
    goals = Goals(arguments.goal_share, arguments.goal_gap, arguments.goal_rise)
    with screen.progress("Reading", None, "tokens") as advance:
        direction = diffmean_direction(
            loaded, corpora["estimate"], arguments.source, arguments.target, advance
        )
    read_table(screen, direction.metadata["read"], DIRECTIONS.minimum, "text read for the direction")
    material = Material(
        loaded,
        corpora["estimate"],
        arguments.source,
        arguments.target,
        directions=(direction,),
        layers=layers,
    )
    search_spaces = spaces(material, arguments.methods)
    scoring = Scoring(
        loaded,
        corpora["choose"],
        arguments.source,
        arguments.target,
        prompts=arguments.prompts,
        samples=arguments.samples,
        lines=arguments.lines,
        seed=arguments.seed,
        new_tokens=arguments.new_tokens,
        temperature=arguments.temperature,
        classifier=classifier,
    )
    search = Search(
        scoring,
        search_spaces,
        partial(applied, loaded),
        out / STUDY,
        _identity(
            arguments,
            loaded,
            corpora,
            {name: space.as_json() for name, space in search_spaces.items()},
            classifier,
        ),
        goals,
        arguments.seed,
    )
    earlier = len(search.trials)
    if earlier:
        screen.stage("search", f"continues after {earlier} trials of an earlier run")
    with screen.progress("Searching", arguments.trials, "trials") as advance:
        advance(min(earlier, arguments.trials))
        finished = search.run(arguments.trials, lambda trial: advance(1))
    if not search.trials:
        raise click.exceptions.Abort
    if finished:
        screen.stage("confirm", "...")
    # Without sampling, every seed gives the same text.
    seeds = [] if arguments.temperature == 0 else [arguments.seed + 1, arguments.seed + 2]
    trials = confirmed(search, seeds=seeds) if finished else search.trials
    choice = choose(trials, goals, scoring.ceiling)
    plan = search.plan(choice.trial)
    result = SearchResult(
        source=arguments.source,
        target=arguments.target,
        goals=goals,
        ceiling=scoring.ceiling,
        trials=tuple(trials),
        front=tuple(trial.number for trial in front(trials)),
        chosen=choice.trial.number,
        chosen_meets_goals=choice.met,
        why=choice.why,
        report=_reported(screen, arguments, loaded, corpora["report"], plan, goals, classifier)
        if finished
        else None,
        finished=finished,
        about={
            "identity": search.identity,
            "edit": PLAN,
            "model": loaded.label,
            "fingerprint": loaded.fingerprint,
            "corpora": texts_read(corpora.values()),
            "read": direction.metadata["read"],
            "packages": measured_by("optuna"),
            "processor": processor(loaded.device),
            "command": command_line(
                languages=arguments.languages or corpora["report"].languages,
                samples=arguments.samples,
                **loaded_as(loaded),
            ),
        },
    )
    plan.save(out / PLAN)
    figure = front_figure(result)
    for kind in FORMATS:
        save_figure(figure, out / f"front.{kind}")
    write_atomically(out / RESULT, json_bytes(search_document(result)))
    _show(screen, result, out)
    if not finished:
        raise click.exceptions.Abort


def _dry_run(screen: Screen, arguments: SimpleNamespace, corpora: dict[str, Corpus]) -> None:
    from cli.dry_run import dry_run
    from editing.pipeline.needs import direction_need, evaluation_need, study_needs
    from editing.study.registry import searched_named
    from neurons.recording.needs import text_of
    from neurons.text.token_budget import KEYS, LOSSES

    def needs(planned: LoadedModel) -> list[Need]:
        text = {
            part: text_of(planned, corpora[part], default=budget.tokens)
            for part, budget in (("estimate", KEYS), ("report", LOSSES))
        }
        solving = study_needs(planned, text["estimate"], searched_named(arguments.methods).values())
        evaluation = evaluation_need(planned, text["report"], new_tokens=arguments.new_tokens)
        return [direction_need(planned, text["estimate"]), *solving, evaluation]

    dry_run(screen, arguments, needs)


def _identity(
    arguments: SimpleNamespace,
    loaded: LoadedModel,
    corpora: dict[str, Corpus],
    knobs: dict[str, Any],
    classifier: Classifier,
) -> dict[str, Any]:
    """Everything that determines the figures of a trial; error messages name the keys."""
    from editing.study.provenance import measured_by

    return {
        "model": loaded.fingerprint,
        "model files": loaded.files_digest,
        "packages": measured_by("optuna"),
        "corpus": {part: corpus.digest for part, corpus in corpora.items()},
        "tokens": arguments.tokens,
        "source": arguments.source,
        "target": arguments.target,
        "methods": list(arguments.methods),
        "layers": arguments.layers,
        "knobs": knobs,
        "prompts": arguments.prompts,
        "samples": arguments.samples,
        "lines": arguments.lines,
        "new tokens": arguments.new_tokens,
        "temperature": arguments.temperature,
        "goals": [arguments.goal_share, arguments.goal_gap, arguments.goal_rise],
        "seed": arguments.seed,
        "classifier": classifier.provenance,
        "device": str(loaded.device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }


def _reported(
    screen: Screen,
    arguments: SimpleNamespace,
    loaded: LoadedModel,
    corpus: Corpus,
    plan: Plan,
    goals: Goals,
    classifier: Classifier,
) -> Reported:
    """The unedited and the edited model on the reporting part of the text."""
    from editing.evaluation.evaluation import Evaluation
    from editing.plans.applied import applied
    from editing.study.search_report import goals_met
    from editing.study.search_result import Reported

    with screen.progress("Reporting", 2, "models") as advance:
        evaluation = Evaluation(
            loaded,
            corpus,
            arguments.source,
            arguments.target,
            samples=arguments.samples if arguments.temperature == 0 else max(arguments.samples, SAMPLES),
            max_prompts=arguments.prompts,
            seed=arguments.seed,
            new_tokens=arguments.new_tokens,
            temperature=arguments.temperature,
            classifier=classifier,
        )
        advance(1)
        details = {
            "settings": plan.metadata["settings"],
            "components": plan.components,
            "relative_change": plan.relative_change(),
        }
        edited = evaluation.measure("tuned edit", partial(applied, loaded, plan), details, kl=True)
        advance(1)
    met = goals_met(edited, evaluation.ceiling, arguments.source, arguments.target, goals)
    return Reported(evaluation.ceiling, evaluation.continuations, met, (evaluation.base, edited))


def _show(screen: Screen, search: SearchResult, out: Path) -> None:
    from cli.tables import report_table, say_samples
    from editing.study.search_report import COLUMNS, rows
    from editing.study.search_result import search_document
    from editing.study.trial import REFUSED

    early = sum(trial.state != "measured" for trial in search.trials)
    screen.table(
        f"Pareto front of {len(search.trials)} edits ({early} stopped early), on the choosing part",
        COLUMNS,
        rows(search),
        words=3,
    )
    for why in dict.fromkeys(trial.why for trial in search.trials if trial.state == REFUSED):
        screen.say(f"refused: {why}")
    screen.say(f"* trial {search.chosen}: {search.why}")
    report = search.result
    if report is None or search.report is None:
        screen.say("the search was interrupted before the report: the same command resumes it")
    else:
        report_table(screen, report)
        missed = [name for name, met in search.report.goals_met.items() if not met]
        screen.say(f"goals on the reporting part: {'not met: ' + ', '.join(missed) if missed else 'all met'}")
        say_samples(screen, report.outcomes[-1])
    screen.say(f"all trials, and a plot of the front: {out / RESULT} {out / 'front.png'}")
    screen.result(out / PLAN, out=out, **search_document(search))
