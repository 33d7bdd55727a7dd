"""All scorers at the same set size: zero the neurons of each language and measure every language.

For each scorer and each language, the N best members by the scorer's values (all of them if there are fewer; the table
shows the number) are ablated: their ``down_proj`` columns are zeroed in the loaded model.  Measured is the rise of each
language's negative log-likelihood (nats a token) on other text, also for as many random neurons of the same layers.  The
table has a row for each method:

    own rise         rise of the language whose neurons are zeroed, mean over languages
    other rise       largest rise of any other language, mean over languages
    specificity      own rise / largest other rise, median over languages (inf if no other language rises, 0 if the
                     language itself does not)
    over random      own rise minus that of the random neurons, mean over languages and draws
    own is largest   number of languages whose own rise is the largest of its row

    python benchmarks/scorers.py artifacts/demo/model --corpus artifacts/demo/corpus --part estimate \\
        --held-out artifacts/demo/corpus --held-out-part report \\
        --prompts artifacts/demo/prompts --control artifacts/demo/control
"""

from __future__ import annotations

import json
import math
import statistics as summary
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from cli.options import CommaSeparated
from editing.evaluation.likelihood import mean_nll
from editing.methods.scale import scale_plan
from editing.plans.applied import applied
from neurons.errors import BrocaError, UsageError
from neurons.models.source import LoadedModel, load_model
from neurons.neuron_sets.identify import DEFAULT_METHOD, random_set, require_parallel
from neurons.neuron_sets.neuron_set import NeuronSet, neuron_set
from neurons.recording.answers import merge_moments, record_answers
from neurons.recording.corpus_recording import record_corpus
from neurons.scorers.method import CONFUSIONS, PROMPTS, Scorer
from neurons.scorers.registry import METHODS, moments_of
from neurons.scorers.selection import Selected, select
from neurons.statistics.statistics import Statistics
from neurons.text.batches import TokenBatch, language_batches
from neurons.text.corpus import PARTS, Corpus, read_corpus
from neurons.text.prompts import Prompts, read_prompts

HEADER = (
    "method",
    "neurons a language",
    "own rise",
    "other rise",
    "specificity",
    "over random",
    "own is largest",
)
Batches = Mapping[str, Sequence[TokenBatch]]
Rises = dict[str, dict[str, float]]  # ablated language -> evaluated language -> nats a token


def best_members(method: type[Scorer], statistics: Statistics, size: int, rate: float) -> list[Selected]:
    """The ``size`` best members of each language, or fewer if the method selects fewer.

    If the score depends on the rate, the rate is doubled until every language has enough members.
    """
    how = method.selection.changed(scope="language", ends="top", top_rate=1.0)
    fullest: list[Selected] = []
    while True:
        found = [
            Selected(one.rows[:size], one.scores[:size], one.kinds[:size])
            for one in select(method().scores(statistics, rate), how)
        ]
        if not fullest or sum(len(one.rows) for one in found) > sum(len(one.rows) for one in fullest):
            fullest = found
        enough = all(len(one.rows) == size for one in fullest)
        if enough or not method.rate_in_score or rate == 1.0:
            return fullest
        rate = min(1.0, 2 * rate)


def prompt_statistics(loaded: LoadedModel, prompts: Prompts, control: Prompts | None) -> Statistics:
    recorded = [record_answers(loaded, prompts, moment) for moment in ("answer", "integrated")]
    if control is not None:
        recorded.append(record_answers(loaded, control, "answer_control"))
    return merge_moments(recorded)


def _nll(loaded: LoadedModel, batches: Batches) -> dict[str, float]:
    return {language: mean_nll(loaded, some) for language, some in batches.items()}


def ablated(
    loaded: LoadedModel, neurons: NeuronSet, language: str, batches: Batches, base: Mapping[str, float]
) -> dict[str, float]:
    """The rise of each language's NLL with the neurons of ``language`` zeroed."""
    with applied(loaded, scale_plan(loaded, neurons, [language], 0.0)):
        return {k: nll - base[k] for k, nll in _nll(loaded, batches).items()}


def matrix(loaded: LoadedModel, neurons: NeuronSet, batches: Batches, base: Mapping[str, float]) -> Rises:
    """``ablated`` for each language that has neurons."""
    return {
        language: ablated(loaded, neurons, language, batches, base)
        for language in neurons.languages
        if len(neurons.of(language))
    }


def own_rises(
    loaded: LoadedModel, neurons: NeuronSet, batches: Batches, base: Mapping[str, float]
) -> dict[str, float]:
    return {
        k: ablated(loaded, neurons, k, {k: batches[k]}, base)[k]
        for k in neurons.languages
        if len(neurons.of(k))
    }


def other_rise(row: Mapping[str, float], language: str) -> float:
    return max(rise for k, rise in row.items() if k != language)


def specificity(row: Mapping[str, float], language: str) -> float:
    own, other = row[language], other_rise(row, language)
    if own <= 0:
        return 0.0
    return own / other if other > 0 else math.inf


def summarised(
    sizes: Mapping[str, int], draws: Sequence[Rises], random: Sequence[Mapping[str, float]]
) -> Any:
    """The numbers of a method's row.

    Args:
        sizes: neurons by language.
        draws: the matrix, or a matrix for each seed if the method is random.
        random: own rises of random neurons by language, for each seed.
    """
    rows = [(row, language) for rises in draws for language, row in rises.items()]
    if not rows:
        return {"sizes": dict(sizes)}
    own = summary.mean(row[language] for row, language in rows)
    chance = [rise for rises in random for rise in rises.values()]
    return {
        "sizes": dict(sizes),
        "own": own,
        "other": summary.mean(other_rise(row, language) for row, language in rows),
        # inf is no JSON.
        "specificity": str(summary.median(specificity(row, language) for row, language in rows)),
        "over_random": own - summary.mean(chance) if chance else None,
        "own_is_largest": sum(row[k] > other_rise(row, k) for row, k in rows) / len(draws),
        "languages": len(rows) // len(draws),
        "rises": list(draws),
    }


def row_of(name: str, found: Mapping[str, Any]) -> str:
    sizes = list(found["sizes"].values())
    size = str(sizes[0]) if len(set(sizes)) == 1 else f"{summary.mean(sizes):.1f} ({min(sizes)}-{max(sizes)})"
    if "own" not in found:
        return f"| {name} | {size} |" + " - |" * (len(HEADER) - 2)
    over = "-" if found["over_random"] is None else f"{found['over_random']:+.3f}"
    return (
        f"| {name} | {size} | {found['own']:+.3f} | {found['other']:+.3f} | {float(found['specificity']):.2f} "
        f"| {over} | {found['own_is_largest']:.3g} of {found['languages']} |"
    )


def first_lines(corpus: Corpus, lines: int) -> Corpus:
    return replace(corpus, texts={language: texts[:lines] for language, texts in corpus.texts.items()})


def runnable(text: Corpus, prompts: Prompts | None, control: Prompts | None) -> tuple[str, ...]:
    """The methods that can run on the given text and prompts; the reason for leaving out others goes to stderr."""
    names = []
    for name, method in METHODS.items():
        if method.control or method.unit != "neuron" or method.reads == CONFUSIONS:
            continue
        if method.reads == PROMPTS:
            needs_control = any(moment.endswith(":answer_control") for moment in method.moments)
            if prompts is None or (needs_control and control is None):
                print(
                    f"{name} is left out: it needs --prompts{' and --control' * needs_control}",
                    file=sys.stderr,
                )
                continue
        else:
            try:
                require_parallel(name, text)
            except UsageError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
        names.append(name)
    return tuple(names)


@click.command()
@click.argument("model")
@click.option("--corpus", type=click.Path(path_type=Path), required=True, help="To identify on.")
@click.option("--part", type=click.Choice(list(PARTS)), default="all")
@click.option("--held-out", type=click.Path(path_type=Path), required=True, help="To measure on.")
@click.option("--held-out-part", type=click.Choice(list(PARTS)), default="all")
@click.option("--lines", type=click.IntRange(min=1), default=30, help="Held-out lines a language, at most.")
@click.option("--languages", type=CommaSeparated())
@click.option("--prompts", "prompts_path", type=click.Path(path_type=Path), help="Prompts with answers.")
@click.option("--control", "control_path", type=click.Path(path_type=Path), help="CULNIG's control prompts.")
@click.option("--top-rate", type=click.FloatRange(0, 1, min_open=True), default=0.01, help="Size of a set.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, help="Random draws a language.")
@click.option("--like", default=DEFAULT_METHOD, help="Whose neurons the two random rows follow.")
@click.option("--dtype", default="auto")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the numbers here.")
def main(
    model: str,
    corpus: Path,
    part: str,
    held_out: Path,
    held_out_part: str,
    lines: int,
    languages: tuple[str, ...] | None,
    prompts_path: Path | None,
    control_path: Path | None,
    top_rate: float,
    seeds: int,
    like: str,
    dtype: str,
    json_path: Path | None,
) -> None:
    """Print a Markdown table, a row a method."""
    loaded = load_model(model, dtype=dtype)
    text = read_corpus(corpus, languages, part)
    batches = language_batches(
        loaded, first_lines(read_corpus(held_out, text.languages, held_out_part), lines)
    )
    prompts = None if prompts_path is None else read_prompts(prompts_path, text.languages)
    control = None if control_path is None else read_prompts(control_path, text.languages)
    names = runnable(text, prompts, control)
    if like not in names:
        raise UsageError(f"--like {like}: choose from {', '.join(names)}")
    from_text = tuple(name for name in names if METHODS[name].reads != PROMPTS)
    moments, reads = moments_of((*from_text, "random-matched"))
    recorded = record_corpus(loaded, text, moments, reads)
    answers = None if prompts is None else prompt_statistics(loaded, prompts, control)

    layers, width = loaded.anatomy.layers, loaded.anatomy.neurons
    size = round(top_rate * layers * width)
    base = _nll(loaded, batches)
    numbers: dict[str, Any] = {"base": base, "size": size, "methods": {}}
    # Each language of a set draws from its own seed, counted up from the set's.
    draws = [seed * len(text.languages) for seed in range(seeds)]
    print(f"Rise of NLL, nats a token; at most {size} neurons a language, top rate {top_rate}\n")
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")

    def show(name: str, neurons: NeuronSet, rises: Sequence[Rises], random: Sequence[Any]) -> None:
        sizes = {language: len(neurons.of(language)) for language in neurons.languages}
        numbers["methods"][name] = summarised(sizes, rises, random)
        print(row_of(name, numbers["methods"][name]), flush=True)

    followed = None
    for name in names:
        statistics = answers if METHODS[name].reads == PROMPTS else recorded
        assert statistics is not None
        found = dict(
            zip(text.languages, best_members(METHODS[name], statistics, size, top_rate), strict=True)
        )
        neurons = neuron_set(
            {language: one.rows for language, one in found.items()},
            {language: one.scores for language, one in found.items()},
            layers,
            width,
            {"method": name, "fingerprint": loaded.fingerprint},
        )
        random = [own_rises(loaded, random_set(neurons, seed), batches, base) for seed in draws]
        show(name, neurons, [matrix(loaded, neurons, batches, base)], random)
        if name == like:
            followed = neurons, random
    assert followed is not None
    neurons, random = followed
    for name, activity in (("random", None), ("random-matched", recorded)):
        rises = [matrix(loaded, random_set(neurons, seed, activity), batches, base) for seed in draws]
        show(name, neurons, rises, [] if activity is None else random)
    if json_path is not None:
        json_path.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except BrocaError as error:
        raise SystemExit(f"scorers: {error}") from error
