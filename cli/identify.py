"""``broca identify``: the neurons of each language."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter, methodcaller
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli import options as opt
from cli.corpora import noted_corpus, read_table
from cli.loading import loaded_model, require_models
from cli.screen import Screen
from cli.tables import list_methods

if TYPE_CHECKING:
    from neurons.models.source import LoadedModel
    from neurons.neuron_sets.neuron_set import NeuronSet
    from neurons.scorers.method import Scorer

MAX_LAYER_COLUMNS = 12


@click.command("identify")
@click.argument("model", required=False)
@partial(opt.corpus, required=False)
@click.option(
    "--statistics", type=opt.IN_FILE, help="Statistics, from `broca record`, instead of MODEL and text."
)
@click.option(
    "--prompts",
    type=opt.IN_DIRECTORY,
    help="culnig, integrated-gradients, language-confusion: directory of <language>.jsonl.",
)
@click.option("--control", type=opt.IN_DIRECTORY, help="culnig: control prompts, without the question.")
@click.option("--recognition", type=opt.IN_DIRECTORY, help="culnig: second control prompts.")
@click.option(
    "--answers", type=opt.IN_FILE, help="language-confusion: answers, from `broca ask`, instead of --prompts."
)
@click.option(
    "--sibling",
    help="language-confusion: MODEL tuned on many languages, whose score is subtracted: hub id or directory.",
)
@click.option("--like", type=opt.IN_FILE, help="random, random-matched: the neuron set to match.")
@opt.method("identify", "gradient-contrast")
@click.option(
    "--top-rate", type=opt.FINITE, help="Fraction of all neurons to select.  [default: as the method sets]"
)
@click.option(
    "--scope",
    type=click.Choice(["language", "global"]),
    help="Rank neurons within each language, or over all languages.",
)
@click.option(
    "--ends",
    type=click.Choice(["top", "bottom", "both"]),
    help="Select the largest scores, the smallest, or both.",
)
@click.option("--threshold", type=opt.FINITE, help="Minimum score.")
@click.option(
    "--min-exclusivity",
    type=opt.FINITE,
    help="Minimum fraction of a neuron's activity that belongs to its language.",
)
@click.option("--layers", help="Layers to select from, as 1-3 or 1,2,5.  [default: all]")
@click.option("--kinds", type=opt.CommaSeparated(), help="Kinds to select, of specific,related,general.")
@click.option("--seed", type=int, help="random, random-matched: seed of the draw.  [default: 0]")
@opt.tokens
@click.option(
    "--block",
    type=int,
    help="Tokens per block.  [default: the model's context, at most 2048, or 512 with gradients]",
)
@opt.device
@opt.dry_run
@opt.quantised
@click.option("--out", type=opt.OUT_FILE, help="File for the neuron set (.safetensors).")
@opt.json
def command(**options: Any) -> None:
    """Identify the neurons of each language in MODEL (hub id or directory), or with --method head-... its attention heads.

    The text is read once, with a backward pass for gradient methods only; --tokens reads less.  From --statistics it
    takes seconds.  The output is small: some bytes per neuron.

    \b
    Examples:
      broca identify artifacts/demo/model --corpus artifacts/demo/corpus --out neurons.safetensors
      broca identify --method list
      broca identify artifacts/demo/model --corpus artifacts/demo/corpus --method head-gradient --out heads.safetensors
      broca identify --statistics statistics.safetensors --method lape --out neurons.safetensors
    """
    arguments = SimpleNamespace(**options)
    screen = Screen(arguments.as_json)
    if arguments.method == opt.LIST:
        from neurons.scorers.registry import METHODS

        list_methods(
            screen,
            METHODS,
            {"reads": attrgetter("reads"), "needs": methodcaller("needs")},
            {"moments": attrgetter("moments"), "selection": lambda method: method.selection.as_json()},
        )
        return
    from neurons.errors import UsageError
    from neurons.models.processes import is_first
    from neurons.recording.corpus_recording import remove_unfinished
    from neurons.scorers.method import ABLATIONS, CONFUSIONS, PROMPTS
    from neurons.scorers.registry import method_of
    from neurons.setting import assigned, read_settings

    method = method_of(arguments.method)
    if arguments.out is None and not arguments.dry_run:
        raise UsageError("--out is missing: give the file for the neuron set")
    reads_text = (method.records() and not method.control) or method.reads == ABLATIONS
    if arguments.dry_run and (not reads_text or arguments.statistics is not None):
        raise UsageError("--dry-run needs a method that reads text with MODEL: leave it out")
    _check_options(arguments, method)
    neurons: NeuronSet | None
    arguments.settings = read_settings(method.settings(), assigned(arguments.assignments))
    arguments.selection = _selection(arguments)
    method.selection.changed(top_rate=arguments.top_rate, **arguments.selection)  # refuses wrong values
    if method.control:
        neurons = _control(screen, arguments, method)
    elif arguments.statistics is not None:
        neurons = _from_statistics(arguments)
    elif arguments.model is None:
        raise UsageError("MODEL is missing: give a hub id or a directory, or --statistics")
    elif method.reads == PROMPTS:
        neurons = _by_prompts(screen, arguments)
    elif method.reads == CONFUSIONS:
        neurons = _by_confusions(screen, arguments)
    elif method.reads == ABLATIONS:
        neurons = _by_ablations(screen, arguments)
    else:
        neurons = _by_text(screen, arguments)
    if neurons is None or not is_first():
        return
    neurons.save(arguments.out)
    remove_unfinished(arguments.out)
    _show(screen, neurons, arguments)


def _by_text(screen: Screen, arguments: SimpleNamespace) -> NeuronSet | None:
    from neurons.errors import UsageError
    from neurons.neuron_sets.identify import identify, require_parallel
    from neurons.scorers.registry import method_of

    if arguments.corpus is None:
        raise UsageError("--corpus is missing: give a directory of <language>.txt, or --statistics")
    corpus = noted_corpus(screen, arguments)
    require_parallel(arguments.method, corpus)
    method = method_of(arguments.method)
    if arguments.dry_run:
        from cli.dry_run import dry_run_of_text
        from neurons.recording.needs import recording_need
        from neurons.text.token_budget import budget_of

        need = partial(recording_need, moments=method.moments, reads=method.reads, block=arguments.block)
        dry_run_of_text(screen, arguments, corpus, need, budget_of(method.moments, method.reads).tokens)
        return None
    loaded = loaded_model(screen, arguments)
    with screen.progress("Recording activations", None, "tokens") as advance:
        return identify(
            loaded,
            corpus,
            arguments.method,
            arguments.top_rate,
            arguments.tokens,
            arguments.block,
            advance,
            arguments.settings,
            arguments.selection,
            arguments.out,
        )


def _from_statistics(arguments: SimpleNamespace) -> NeuronSet:
    from neurons.neuron_sets.identify import neurons_from
    from neurons.statistics.statistics import load_statistics

    statistics = load_statistics(arguments.statistics)
    return neurons_from(
        statistics, arguments.method, arguments.top_rate, arguments.settings, arguments.selection
    )


def _by_ablations(screen: Screen, arguments: SimpleNamespace) -> NeuronSet | None:
    from neurons.ablation.shapley import record_shapley
    from neurons.errors import UsageError
    from neurons.neuron_sets.identify import neurons_from
    from neurons.scorers.head_shapley import HeadShapley

    if arguments.corpus is None:
        raise UsageError("--corpus is missing: give a directory of <language>.txt")
    corpus = noted_corpus(screen, arguments, 1)
    if arguments.dry_run:
        from cli.dry_run import dry_run_of_text
        from neurons.recording.needs import ablation_need
        from neurons.text.token_budget import SHAPLEY

        dry_run_of_text(screen, arguments, corpus, ablation_need, SHAPLEY.tokens)
        return None
    settings = HeadShapley(**arguments.settings)
    loaded = loaded_model(screen, arguments)
    total = settings.permutations * sum(loaded.anatomy.unit_counts("head")) * len(corpus.languages)
    with screen.progress("Removing heads", total, "heads") as advance:
        statistics = record_shapley(loaded, corpus, settings, arguments.tokens, advance, arguments.out)
    return neurons_from(
        statistics, arguments.method, arguments.top_rate, arguments.settings, arguments.selection
    )


def _by_prompts(screen: Screen, arguments: SimpleNamespace) -> NeuronSet:
    from neurons.neuron_sets.identify import identify_by_prompts, require_prompts
    from neurons.text.prompts import read_prompts

    prompts, control, recognition = (
        None if path is None else read_prompts(path, arguments.languages)
        for path in (arguments.prompts, arguments.control, arguments.recognition)
    )
    require_prompts(arguments.method, prompts, control)
    loaded = loaded_model(screen, arguments)
    with screen.progress("Tracing answers", None, "prompts") as advance:
        return identify_by_prompts(
            loaded,
            prompts,
            arguments.method,
            control,
            recognition,
            arguments.top_rate,
            arguments.settings,
            arguments.selection,
            advance,
        )


def _by_confusions(screen: Screen, arguments: SimpleNamespace) -> NeuronSet:
    from editing.evaluation.confusion_points import points_of_answers, read_changed_answers
    from editing.evaluation.fasttext_identifier import FastTextIdentifier, included_model
    from neurons.errors import UsageError
    from neurons.neuron_sets.identify import identify_by_confusion
    from neurons.recording.confusion import ConfusionPoint, points_of_prompts, record_confusion
    from neurons.scorers.language_confusion import SIBLING, LanguageConfusion
    from neurons.text.prompts import EXAMPLE, read_prompts

    if (arguments.prompts is None) == (arguments.answers is None):
        raise UsageError(
            f"--method {arguments.method} needs the points where answers change their language: give either --answers FILE of "
            f"`broca ask`, or --prompts DIR of <language>.jsonl with lines like {EXAMPLE}, whose answers are in a wrong language"
        )
    points: Callable[[LoadedModel], dict[str, list[ConfusionPoint]]]
    if arguments.prompts is not None:
        prompts = read_prompts(arguments.prompts, arguments.languages)
        points, digest = partial(points_of_prompts, prompts=prompts), prompts.digest
    else:
        identifier = FastTextIdentifier(included_model())
        changed = read_changed_answers(arguments.answers, arguments.languages, identifier)
        for language, count in changed.answers.items():
            screen.note(
                f"{language}: {len(changed.of.get(language, ()))} of {count} answers change their language"
            )
        points, digest = partial(points_of_answers, changed=changed), changed.digest
    sibling = None
    if arguments.sibling is not None:
        require_models(arguments.model)
        other = loaded_model(screen, arguments, arguments.sibling)
        top, moment = LanguageConfusion(**arguments.settings).top, SIBLING.partition(":")[2]
        with screen.progress("Reading the sibling", None, "points") as advance:
            sibling = record_confusion(other, points(other), top, moment, advance)
        del other
    loaded = loaded_model(screen, arguments)
    with screen.progress("Reading the points", None, "points") as advance:
        return identify_by_confusion(
            loaded,
            points(loaded),
            digest,
            sibling,
            arguments.top_rate,
            arguments.settings,
            arguments.selection,
            advance,
        )


def _control(screen: Screen, arguments: SimpleNamespace, method: type[Scorer]) -> NeuronSet:
    from neurons.errors import BrocaError, UsageError
    from neurons.models.source import open_model
    from neurons.neuron_sets.identify import random_neurons, random_set
    from neurons.neuron_sets.neuron_set import load_neuron_set
    from neurons.recording.corpus_recording import record_corpus
    from neurons.statistics.statistics import load_statistics
    from neurons.text.corpus_files import language_label

    seed = arguments.seed or 0
    if arguments.like is None:
        if method.moments or arguments.model is None or arguments.languages is None:
            without = "" if method.moments else ", or MODEL and --languages"
            raise UsageError(
                f"--method {arguments.method} needs --like neurons.safetensors, the set to match{without}"
            )
        rate = method.selection.top_rate if arguments.top_rate is None else arguments.top_rate
        return random_neurons(
            open_model(arguments.model), tuple(map(language_label, arguments.languages)), rate, seed
        )
    like = load_neuron_set(arguments.like)
    if not method.moments:
        return random_set(like, seed)
    if arguments.statistics is not None:
        statistics = load_statistics(arguments.statistics)
        made_for = like.metadata.get("fingerprint")
        if made_for and statistics.fingerprint and made_for != statistics.fingerprint:
            raise BrocaError(
                f"{arguments.statistics} is of a model with fingerprint {statistics.fingerprint}, but "
                f"{arguments.like} of one with {made_for}: record the latter"
            )
        return random_set(like, seed, statistics)
    if arguments.model is None or arguments.corpus is None:
        raise UsageError(
            f"--method {arguments.method} needs the activity of neurons: give MODEL and --corpus, or --statistics"
        )
    corpus = noted_corpus(screen, arguments)
    loaded = loaded_model(screen, arguments)
    like.require_model(loaded)
    with screen.progress("Recording activations", None, "tokens") as advance:
        statistics = record_corpus(
            loaded,
            corpus,
            (f"{like.site}:absolute",),
            method.reads,
            arguments.tokens,
            arguments.block,
            None,
            advance,
            arguments.out,
        )
    return random_set(like, seed, statistics)


def _check_options(arguments: SimpleNamespace, method: type[Scorer]) -> None:
    from neurons.scorers.method import ABLATIONS, CONFUSIONS, PROMPTS

    from_statistics = arguments.statistics is not None
    reads_text = not from_statistics and (method.records() or method.reads == ABLATIONS)
    reads_prompts = not from_statistics and method.reads in (PROMPTS, CONFUSIONS)
    confusions = not from_statistics and method.reads == CONFUSIONS
    control = method.control
    from_set = arguments.like is not None and control and not method.moments
    accepted = {
        "corpus": reads_text,
        "part": reads_text,
        "tokens": reads_text,
        "block": reads_text and method.records(),
        "roles": reads_text,
        "prompts": reads_prompts,
        "control": reads_prompts and "mlp_act:answer_control" in method.moments,
        "recognition": reads_prompts and "mlp_act:answer_control" in method.moments,
        "answers": confusions,
        "sibling": confusions,
        "languages": not from_statistics and not from_set,
        "model": not from_statistics and not from_set,
        **dict.fromkeys(("device", "dtype", "load_in_4bit", "load_in_8bit"), reads_text or reads_prompts),
        "statistics": bool(method.moments),
        "like": control,
        "seed": control,
        **dict.fromkeys(("scope", "ends", "threshold", "min_exclusivity", "layers", "kinds"), not control),
        **dict.fromkeys(("scope", "ends"), not control and not method.rate_in_score),
        "top_rate": not control or arguments.like is None,
    }
    given = " with --statistics" if from_statistics else " with --like" if from_set else ""
    method_text = f"--method {arguments.method}{given}"
    opt.refuse_options(arguments, {name for name in accepted if not accepted[name]}, method_text)


def _selection(arguments: SimpleNamespace) -> dict[str, Any]:
    """What the user chose to select by.

    Raises:
        UsageError: layers that cannot be read, or that MODEL does not have.
    """
    from neurons.models.source import open_model
    from neurons.scorers.selection import parse_layers

    chosen = {
        name: getattr(arguments, name) for name in ("scope", "ends", "threshold", "min_exclusivity", "kinds")
    }
    if arguments.layers is not None:
        # A dry run needs no weights, which opening a model does.
        opens = arguments.model is not None and not arguments.dry_run
        count = open_model(arguments.model).anatomy.layers if opens else None
        chosen["layers"] = parse_layers(arguments.layers, count)
    return {name: value for name, value in chosen.items() if value is not None}


def _show(screen: Screen, neurons: NeuronSet, arguments: SimpleNamespace) -> None:
    counts = {language: [len(rows) for rows in neurons.by_layer(language)] for language in neurons.languages}
    reads = [corpus["read"] for corpus in neurons.metadata.get("corpora", []) if "read" in corpus]
    if reads and arguments.statistics is None:
        from neurons.scorers.registry import method_of
        from neurons.text.token_budget import budget_of

        method = method_of(arguments.method)
        read_table(screen, reads[-1], budget_of(method.moments, method.reads).minimum)
    by_layer = neurons.layers <= MAX_LAYER_COLUMNS
    kinds = {language: neurons.kind_counts(language) for language in neurons.languages}
    screen.table(
        f"{arguments.method}: {neurons.layers} layers of {neurons.neurons} {neurons.unit}s"
        + (f" ({neurons.experts} experts)" if neurons.experts > 1 else ""),
        [
            "language",
            f"{neurons.unit}s",
            *next(iter(kinds.values())),
            *(f"layer {i}" for i in range(neurons.layers) if by_layer),
        ],
        [
            [language, sum(layers), *kinds[language].values(), *(layers if by_layer else [])]
            for language, layers in counts.items()
        ],
    )
    for language, fraction in neurons.metadata.get("unknown", {}).items():
        screen.warn(
            f"{fraction:.0%} of the tokens of {language!r} are unknown to the tokenizer: its neurons are unreliable"
        )
    for kind, lacking in neurons.metadata.get("without_heads", {}).items() if neurons.unit == "head" else ():
        screen.say(f"layers {', '.join(map(str, lacking))} have {kind}: they have no heads to score")
    if neurons.empty_languages:
        screen.warn(
            f"{arguments.method} found no {neurons.unit}s for {', '.join(neurons.empty_languages)}: none passes its thresholds; "
            "try --method gradient-contrast, a larger --top-rate, or other settings (--set)"
        )
    screen.result(
        out=arguments.out,
        method=arguments.method,
        unit=neurons.unit,
        fingerprint=neurons.metadata.get("fingerprint"),
        tokens=neurons.metadata.get("tokens"),
        read=reads[-1] if reads else None,
        neurons={language: sum(layers) for language, layers in counts.items()},
        by_layer=counts,
        kinds=kinds,
        notes=neurons.metadata.get("notes", {}),
        empty=list(neurons.empty_languages),
    )
