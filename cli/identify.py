"""``broca identify``: which neurons carry which language."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli.corpora import read, tell_read
from cli.loading import announced
from cli.options import (
    FINITE,
    IN_DIRECTORY,
    IN_FILE,
    OUT_FILE,
    PARTS,
    CommaSeparated,
    bits_asked,
    device_options,
    dry_run_option,
    json_option,
    quantised_options,
    tokens_option,
)
from cli.screen import Screen

if TYPE_CHECKING:
    from neurons.models.memory import Need
    from neurons.models.source import LoadedModel
    from neurons.neuron_sets.neuron_set import NeuronSet
    from neurons.scorers.method import Scorer

LIST = "list"
MOST_LAYERS_SHOWN = 12


@click.command("identify")
@click.argument("model", required=False)
@click.option(
    "--corpus",
    type=IN_DIRECTORY,
    help="Directory of <language>.txt, .jsonl or .parquet, one text a line or row.",
)
@click.option("--statistics", type=IN_FILE, help="From `broca record`: no model and no text are read.")
@click.option("--prompts", type=IN_DIRECTORY, help="culnig, integrated-gradients: <language>.jsonl.")
@click.option("--control", type=IN_DIRECTORY, help="culnig: the same without the question.")
@click.option("--recognition", type=IN_DIRECTORY, help="culnig: a second control.")
@click.option("--like", type=IN_FILE, help="random, random-matched: the neuron set to follow.")
@click.option("--languages", type=CommaSeparated(), help="Which, as en,fr,de.  [default: all]")
@click.option(
    "--part",
    type=click.Choice(PARTS),
    default="all",
    show_default=True,
    help="Lines to read: half to estimate from, a quarter to choose settings on, a quarter to report, by "
    "line number.",
)
@click.option(
    "--method", default="gradient-contrast", show_default=True, help="One of `broca identify --method list`."
)
@click.option("--top-rate", type=FINITE, help="Share of all neurons kept.  [default: the method's own]")
@click.option(
    "--scope", type=click.Choice(["language", "global"]), help="Best neurons of each language, or of all."
)
@click.option(
    "--ends", type=click.Choice(["top", "bottom", "both"]), help="Largest scores, smallest or both."
)
@click.option("--threshold", type=FINITE, help="Only scores of at least this.")
@click.option("--min-exclusivity", type=FINITE, help="Least share of its language in what a neuron does.")
@click.option("--layers", help="Only these, as 1-3 or 1,2,5.  [default: all]")
@click.option("--kinds", type=CommaSeparated(), help="Only these of specific,related,general.")
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="A setting of the method.")
@click.option("--seed", type=int, help="random, random-matched: of the draw.  [default: 0]")
@tokens_option
@click.option(
    "--block",
    type=int,
    help="Tokens a block.  [default: the model's context, at most 2048, with gradients 512]",
)
@device_options
@dry_run_option
@quantised_options
@click.option("--out", type=OUT_FILE, help="File for the neuron set (.safetensors).")
@json_option
def command(**options: Any) -> None:
    """Find the neurons of MODEL (hub id or directory) that carry each language.

    The text is read once, forward and back for the gradient methods, forward alone for lape and most others;
    --tokens reads less.  From --statistics it takes seconds.  The file is small: some bytes a neuron found.

    \b
    Examples:
      broca identify artifacts/demo/model --corpus artifacts/demo/corpus --out neurons.safetensors
      broca identify --method list
      broca identify --statistics statistics.safetensors --method lape --out neurons.safetensors
    """
    asked = SimpleNamespace(**options)
    screen = Screen(asked.as_json)
    if asked.method == LIST:
        _list(screen)
        return
    from neurons.errors import UsageError
    from neurons.models.processes import is_first
    from neurons.recording.corpus_recording import remove_unfinished
    from neurons.scorers.method import NOTHING, PROMPTS
    from neurons.scorers.registry import method_of
    from neurons.scorers.setting import assigned, read_settings

    method = method_of(asked.method)
    if asked.out is None:
        raise UsageError("--out is missing: name the file for the neuron set")
    if asked.dry_run and (method.reads in (NOTHING, PROMPTS) or asked.statistics is not None):
        raise UsageError("--dry-run is about text that is read by a model: leave it out here")
    _refuse_foreign(asked, method)
    found: NeuronSet | None
    asked.settings = read_settings(method.settings(), assigned(asked.assignments))
    if method.control:
        found = _control(screen, asked, method)
    elif asked.statistics is not None:
        found = _from_statistics(asked)
    elif asked.model is None:
        raise UsageError("name the MODEL, or give --statistics")
    elif method.reads == PROMPTS:
        found = _by_prompts(screen, asked)
    else:
        found = _by_text(screen, asked)
    if found is None or not is_first():
        return
    found.save(asked.out)
    remove_unfinished(asked.out)
    _show(screen, found, asked)


def _by_text(screen: Screen, asked: SimpleNamespace) -> NeuronSet | None:
    from neurons.errors import UsageError
    from neurons.models.source import load_model
    from neurons.neuron_sets.identify import identify, require_parallel
    from neurons.scorers.registry import method_of

    if asked.corpus is None:
        raise UsageError("--corpus is missing: a directory of <language>.txt, or give --statistics")
    corpus = read(screen, asked.corpus, asked.languages, asked.part)
    require_parallel(asked.method, corpus)
    method = method_of(asked.method)
    if asked.dry_run:
        from cli.dry_run import dry_run
        from neurons.recording.needs import recording_need, text_of

        def needs(planned: LoadedModel) -> list[Need]:
            text = text_of(planned, corpus, asked.tokens)
            return [recording_need(planned, text, method.moments, method.reads, asked.block)]

        dry_run(screen, asked.model, asked.device, asked.dtype, needs)
        return None
    loaded = announced(screen, load_model(asked.model, asked.device, asked.dtype, bits=bits_asked(asked)))
    with screen.progress("Recording activations", None, "tokens") as advance:
        return identify(
            loaded,
            corpus,
            asked.method,
            asked.top_rate,
            asked.tokens,
            asked.block,
            advance,
            asked.settings,
            _selection(asked),
            asked.out,
        )


def _from_statistics(asked: SimpleNamespace) -> NeuronSet:
    from neurons.neuron_sets.identify import neurons_from
    from neurons.statistics.statistics import load_statistics

    statistics = load_statistics(asked.statistics)
    return neurons_from(statistics, asked.method, asked.top_rate, asked.settings, _selection(asked))


def _by_prompts(screen: Screen, asked: SimpleNamespace) -> NeuronSet:
    from neurons.models.source import load_model
    from neurons.neuron_sets.identify import identify_by_prompts, require_prompts
    from neurons.text.prompts import read_prompts

    prompts, control, recognition = (
        None if path is None else read_prompts(path, asked.languages)
        for path in (asked.prompts, asked.control, asked.recognition)
    )
    require_prompts(asked.method, prompts, control)
    loaded = announced(screen, load_model(asked.model, asked.device, asked.dtype, bits=bits_asked(asked)))
    with screen.progress("Tracing answers", None, "prompts") as advance:
        return identify_by_prompts(
            loaded,
            prompts,
            asked.method,
            control,
            recognition,
            asked.top_rate,
            asked.settings,
            _selection(asked),
            advance,
        )


def _control(screen: Screen, asked: SimpleNamespace, method: type[Scorer]) -> NeuronSet:
    from neurons.errors import BrocaError, UsageError
    from neurons.models.source import load_model, open_model
    from neurons.neuron_sets.identify import random_neurons, random_set
    from neurons.neuron_sets.neuron_set import load_neuron_set
    from neurons.recording.corpus_recording import record_corpus
    from neurons.statistics.statistics import load_statistics
    from neurons.text.corpus_files import language_label

    seed = asked.seed or 0
    if asked.like is None:
        if method.moments or asked.model is None or asked.languages is None:
            without = "" if method.moments else ", or MODEL and --languages for a set that follows none"
            raise UsageError(
                f"--method {asked.method} needs --like neurons.safetensors, the set to follow{without}"
            )
        rate = method.selection.top_rate if asked.top_rate is None else asked.top_rate
        return random_neurons(
            open_model(asked.model), tuple(map(language_label, asked.languages)), rate, seed
        )
    like = load_neuron_set(asked.like)
    if not method.moments:
        return random_set(like, seed)
    if asked.statistics is not None:
        statistics = load_statistics(asked.statistics)
        made_for = like.metadata.get("fingerprint")
        if made_for and statistics.fingerprint and made_for != statistics.fingerprint:
            raise BrocaError(
                f"{asked.statistics}: recorded from a model with fingerprint {statistics.fingerprint}, but "
                f"{asked.like} is of one with {made_for}: record that model"
            )
        return random_set(like, seed, statistics)
    if asked.model is None or asked.corpus is None:
        raise UsageError(
            f"--method {asked.method} needs to know how active neurons are: give MODEL and --corpus, or --statistics"
        )
    corpus = read(screen, asked.corpus, asked.languages, asked.part)
    loaded = announced(screen, load_model(asked.model, asked.device, asked.dtype, bits=bits_asked(asked)))
    like.require_model(loaded)
    with screen.progress("Recording activations", None, "tokens") as advance:
        statistics = record_corpus(
            loaded, corpus, method.moments, method.reads, asked.tokens, asked.block, None, advance, asked.out
        )
    return random_set(like, seed, statistics)


def _refuse_foreign(asked: SimpleNamespace, method: type[Scorer]) -> None:
    """An option that a method would not look at is an error, not a silence."""
    from neurons.errors import UsageError
    from neurons.scorers.method import NOTHING, PROMPTS

    by_statistics = asked.statistics is not None
    reads_text = not by_statistics and method.reads not in (PROMPTS, NOTHING)
    reads_prompts = not by_statistics and method.reads == PROMPTS
    control = method.control
    meant = {
        "corpus": reads_text,
        "tokens": reads_text,
        "block": reads_text,
        "prompts": reads_prompts,
        "control": reads_prompts and "mlp_act:answer_control" in method.moments,
        "recognition": reads_prompts and "mlp_act:answer_control" in method.moments,
        "languages": not by_statistics,
        "model": not by_statistics,
        "statistics": bool(method.moments),
        "like": control,
        "seed": control,
        **dict.fromkeys(("scope", "ends", "threshold", "min_exclusivity", "layers", "kinds"), not control),
        "top_rate": not control or asked.like is None,
    }
    for name, means_something in meant.items():
        if getattr(asked, name) is not None and not means_something:
            option = "MODEL" if name == "model" else "--" + name.replace("_", "-")
            where = f"--method {asked.method}" + (" with --statistics" if by_statistics else "")
            raise UsageError(f"{option} means nothing to {where}: leave it out")


def _selection(asked: SimpleNamespace) -> dict[str, Any]:
    from neurons.scorers.selection import parse_layers

    chosen = {
        name: getattr(asked, name) for name in ("scope", "ends", "threshold", "min_exclusivity", "kinds")
    }
    chosen["layers"] = None if asked.layers is None else parse_layers(asked.layers)
    return {name: value for name, value in chosen.items() if value is not None}


def _list(screen: Screen) -> None:
    from neurons.scorers.registry import METHODS
    from neurons.scorers.setting import defaults

    screen.table(
        "methods",
        ["method", "what it ranks neurons by", "source", "reads", "needs"],
        [
            [name, method.line, method.source, method.reads, method.needs()]
            for name, method in METHODS.items()
        ],
        words=5,
    )
    screen.result(
        {
            name: {
                "line": method.line,
                "source": method.source,
                "reads": method.reads,
                "needs": method.needs(),
                "moments": list(method.moments),
                "settings": defaults(method.settings()),
                "selection": method.selection.as_json(),
            }
            for name, method in METHODS.items()
        }
    )


def _show(screen: Screen, found: NeuronSet, asked: SimpleNamespace) -> None:
    counts = {language: [len(rows) for rows in found.by_layer(language)] for language in found.languages}
    read_by = [corpus["read"] for corpus in found.metadata.get("corpora", []) if "read" in corpus]
    if read_by and asked.statistics is None:
        from neurons.scorers.registry import method_of
        from neurons.text.token_budget import budget_of

        method = method_of(asked.method)
        tell_read(screen, read_by[-1], budget_of(method.moments, method.reads).minimum)
    by_layer = found.layers <= MOST_LAYERS_SHOWN
    kinds = {language: found.kind_counts(language) for language in found.languages}
    screen.table(
        f"{asked.method}: neurons of {found.layers} x {found.neurons}"
        + (f" ({found.experts} experts)" if found.experts > 1 else ""),
        [
            "language",
            "neurons",
            *next(iter(kinds.values())),
            *(f"layer {i}" for i in range(found.layers) if by_layer),
        ],
        [
            [language, sum(layers), *kinds[language].values(), *(layers if by_layer else [])]
            for language, layers in counts.items()
        ],
    )
    for language, share in found.metadata.get("unknown", {}).items():
        screen.warn(
            f"the tokenizer does not know {share:.0%} of the tokens of {language!r}: its neurons say little"
        )
    if found.empty_languages:
        screen.warn(
            f"{asked.method} found no neuron for {', '.join(found.empty_languages)}: none passes its thresholds; "
            "try --method gradient-contrast, a larger --top-rate, or other settings (--set)"
        )
    screen.result(
        {
            "out": asked.out,
            "method": asked.method,
            "fingerprint": found.metadata.get("fingerprint"),
            "tokens": found.metadata.get("tokens"),
            "neurons": {language: sum(layers) for language, layers in counts.items()},
            "by_layer": counts,
            "kinds": kinds,
            "notes": found.metadata.get("notes", {}),
            "empty": list(found.empty_languages),
        },
        asked.out,
    )
