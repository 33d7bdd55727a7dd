"""Identify language neurons: from a model or statistics to a neuron set with its provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from neurons.errors import UsageError
from neurons.models.source import LoadedModel, ModelSource
from neurons.neuron_sets.neuron_set import NeuronSet, neuron_set
from neurons.recording.answers import merge_moments, record_answers
from neurons.recording.confusion import ConfusionPoint, record_confusion
from neurons.recording.corpus_recording import model_metadata, record_corpus
from neurons.recording.text_pass import Progress
from neurons.scorers.language_confusion import LanguageConfusion
from neurons.scorers.method import CONFUSIONS, PROMPTS, Scorer
from neurons.scorers.random_control import random_like, random_matched, random_scores
from neurons.scorers.registry import method_of
from neurons.scorers.selection import Selected, Selection, select
from neurons.statistics.statistics import Statistics
from neurons.text.corpus import Corpus
from neurons.text.prompts import EXAMPLE, Prompts

DEFAULT_METHOD = "gradient-contrast"
_CONTROL = "mlp_act:answer_control"


def identify(
    loaded: LoadedModel,
    corpus: Corpus,
    method: str = DEFAULT_METHOD,
    top_rate: float | None = None,
    tokens: int | None = None,
    block: int | None = None,
    progress: Progress | None = None,
    settings: Mapping[str, Any] | None = None,
    selection: Mapping[str, Any] | None = None,
    out: Path | None = None,
) -> NeuronSet:
    """Identify language neurons from text.

    Args:
        loaded: the model.
        corpus: text of at least two languages.
        method: a key of ``neurons.scorers.registry.METHODS`` that reads text.
        top_rate: fraction of all neurons to keep; None takes the method's default.
        tokens: maximum tokens a language; None takes all.
        block: tokens a block; None takes the model's context, at most 2048.
        progress: called with the number of tokens of each batch.
        settings: of the scorer; the others keep the published values.
        selection: fields of ``Selection``; the others keep the method's defaults.
        out: where the set will be written; an unfinished recording is kept beside it.

    Raises:
        UsageError: an unknown method or one that reads no text, too little text in a language, text that
            is not parallel for a method that needs it, or a rate outside (0, 1].
    """
    scorer = method_of(method)
    if not scorer.records() or scorer.control:
        raise UsageError(f"method {method!r} does not read text: it needs {_needs(scorer)}")
    require_parallel(method, corpus)
    statistics = record_corpus(
        loaded, corpus, scorer.moments, scorer.reads, tokens, block, progress=progress, out=out
    )
    return neurons_from(statistics, method, top_rate, settings, selection)


def identify_by_prompts(
    loaded: LoadedModel,
    prompts: Prompts | None,
    method: str,
    control: Prompts | None = None,
    recognition: Prompts | None = None,
    top_rate: float | None = None,
    settings: Mapping[str, Any] | None = None,
    selection: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> NeuronSet:
    """Identify language neurons from prompts with answers.

    Args:
        prompts: of at least two languages.
        method: "culnig" or "integrated-gradients".
        control: for culnig, the options without the question.
        recognition: for culnig, the optional second control.

    Raises:
        UsageError: prompts that the method needs are missing.
    """
    scorer = method_of(method)
    require_prompts(method, prompts, control)
    needs_control = _CONTROL in scorer.moments
    given = {
        "answer" if needs_control else "integrated": prompts,
        **({"answer_control": control} if needs_control else {}),
        **({"answer_recognition": recognition} if recognition is not None else {}),
    }
    recorded = [
        record_answers(loaded, of_moment, moment, progress=progress)
        for moment, of_moment in given.items()
        if of_moment is not None
    ]
    statistics = merge_moments(recorded)
    statistics.metadata.update(
        model_metadata(loaded),
        prompts={moment: of_moment.digest for moment, of_moment in given.items() if of_moment is not None},
    )
    return neurons_from(statistics, method, top_rate, settings, selection)


def identify_by_confusion(
    loaded: LoadedModel,
    points: Mapping[str, Sequence[ConfusionPoint]],
    source: str,
    sibling: Statistics | None = None,
    top_rate: float | None = None,
    settings: Mapping[str, Any] | None = None,
    selection: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> NeuronSet:
    """Identify the neurons that change the language of answers.

    Args:
        points: language that the answers should be in -> points.
        source: digest of the points' file.
        sibling: ``record_confusion`` with the moment "confusion_sibling" on a model that was tuned from the same checkpoint,
            recorded before, so that one model is in memory at a time; None: no sibling.

    Raises:
        UsageError: a sibling of another shape or with other languages.
        BrocaError: as ``record_confusion``.
    """
    top = LanguageConfusion.of(settings or {}).top
    recorded = [record_confusion(loaded, points, top, progress=progress)]
    statistics = merge_moments(recorded if sibling is None else [*recorded, sibling])
    statistics.metadata.update(model_metadata(loaded), prompts={"confusion": source})
    if sibling is not None:
        statistics.metadata["sibling"] = sibling.fingerprint
    return neurons_from(statistics, LanguageConfusion.name, top_rate, settings, selection)


def neurons_from(
    statistics: Statistics,
    method: str,
    top_rate: float | None = None,
    settings: Mapping[str, Any] | None = None,
    selection: Mapping[str, Any] | None = None,
) -> NeuronSet:
    """Score recorded statistics and select neurons, without a model.

    Args:
        statistics: with the moments that the method needs.
        method: a key of ``neurons.scorers.registry.METHODS``.
        top_rate: fraction of all neurons to keep; None takes the method's default.
        settings: of the scorer; the others keep the published values.
        selection: fields of ``Selection``; the others keep the method's defaults.

    Raises:
        UsageError: an unknown method or setting, statistics that lack what it needs, or a top rate that
            keeps no neuron.
    """
    scorer = method_of(method)
    if scorer.control:
        raise UsageError(
            f"method {method!r} is a control of another set: give it with --like neurons.safetensors"
        )
    for corpus in statistics.metadata.get("corpora", []):
        _require_parallel(method, scorer, corpus.get("lines", {}))
    if scorer.unit == "head" and not any(statistics.heads()):
        kinds = ", ".join(statistics.metadata.get("without_heads", {}))
        raise UsageError(
            f"method {method!r} scores heads, but the layers of the model have {kinds}: identify neurons"
        )
    for name in ("scope", "ends"):
        if scorer.rate_in_score and (selection or {}).get(name) is not None:
            raise UsageError(f"method {method!r} applies the rate before ranking: leave out {name}")
    rate = scorer.selection.top_rate if top_rate is None else top_rate
    rule = scorer.selection.changed(top_rate=rate, **(selection or {}))
    if rule.layers is not None and not rule.layers:
        raise UsageError("no layers to select in: leave layers out, or name some")
    scores = scorer.of(settings or {}).scores(statistics, rule.top_rate)
    scores = replace(scores, places=statistics.places(scorer.unit, scores.values))
    selected = select(scores, rule.changed(top_rate=1.0) if scorer.rate_in_score else rule)
    layers, width, _ = scores.values.shape
    count = scores.neurons_in(None if scorer.rate_in_score else rule.layers)
    if round(rule.top_rate * count) == 0:
        raise UsageError(
            f"the top rate {rule.top_rate} keeps none of {count:,} {scorer.unit}s: "
            + (f"use at least {1 / count:.1g}" if count else "choose layers that have some")
        )
    languages = statistics.languages
    metadata = {
        **{key: value for key, value in statistics.metadata.items() if key != "settings"},
        "fingerprint": statistics.fingerprint,
        "unit": scorer.unit,
        "method": method,
        "tokens": dict(zip(languages, statistics.tokens.tolist(), strict=True)),
        "settings": {**asdict(scorer.of(settings or {})), **rule.as_json()},
        "recording": statistics.metadata.get("settings", {}),
        "notes": scores.notes,
    }
    return _selected_set(dict(zip(languages, selected, strict=True)), layers, width, metadata)


def _selected_set(
    selected: Mapping[str, Selected], layers: int, neurons: int, metadata: Mapping[str, Any]
) -> NeuronSet:
    return neuron_set(
        {language: item.rows for language, item in selected.items()},
        {language: item.scores for language, item in selected.items()},
        layers,
        neurons,
        metadata,
        {language: item.kinds for language, item in selected.items()},
    )


def random_set(like: NeuronSet, seed: int = 0, statistics: Statistics | None = None) -> NeuronSet:
    """A random control of a neuron set: as many random neurons in each layer, none of the language's own.

    Args:
        statistics: with ``mlp_in:absolute`` (of heads ``attn_in:absolute``), to match the control in activity too.

    Raises:
        UsageError: a layer without enough other neurons, or statistics of another model.
    """
    members = {}
    places = torch.arange(like.neurons) < torch.tensor(like.counts)[:, None]
    for k, language in enumerate(like.languages):
        rows = like.of(language)
        if statistics is None:
            members[language] = random_like(
                rows, like.layers, like.neurons, seed * len(like.languages) + k, places
            )
        else:
            activity = _head_activity(statistics) if like.unit == "head" else _activity(statistics)
            members[language] = random_matched(rows, activity, seed * len(like.languages) + k)
    metadata = {
        **{
            k: v
            for k, v in like.metadata.items()
            if k in ("model", "fingerprint", "unit", "layers", "neurons", "experts", "neuron_counts", "heads")
        },
        "method": "random" if statistics is None else "random-matched",
        "settings": {
            "seed": seed,
            "like": like.metadata.get("method"),
            "like_settings": like.metadata.get("settings"),
        },
    }
    scores = {language: torch.zeros(len(rows), dtype=torch.float64) for language, rows in members.items()}
    return neuron_set(members, scores, like.layers, like.neurons, metadata)


def _activity(statistics: Statistics) -> torch.Tensor:
    """Mean absolute value of each neuron over all languages together, so that language specificity is not matched.

    An expert without tokens has activity 0, a place without a neuron -inf.
    """
    activity = statistics.moment("mlp_in:absolute").sum(-1) / statistics.seen().sum(-1).clamp(min=1)
    return activity.masked_fill(~statistics.places("neuron", activity), -torch.inf)


def _head_activity(statistics: Statistics) -> torch.Tensor:
    """The same of each head's channels together, float64 [L, A]; -inf where there is no head."""
    absolute = statistics.moment("attn_in:absolute").sum(-1) / statistics.tokens.sum()
    counts = statistics.heads()
    activity = torch.full((len(counts), max(counts)), -torch.inf, dtype=torch.float64)
    for layer, (count, width) in enumerate(zip(counts, statistics.metadata["head_widths"], strict=True)):
        activity[layer, :count] = absolute[layer, : count * width].view(count, width).mean(1)
    return activity


def random_neurons(
    source: ModelSource, languages: tuple[str, ...], top_rate: float, seed: int = 0
) -> NeuronSet:
    """Random neurons for languages of a model, not matched to another set."""
    anatomy = source.anatomy
    counts = anatomy.unit_counts("neuron")
    scores = random_scores(anatomy.layers, anatomy.neurons, len(languages), seed, counts)
    selected = select(scores, Selection(top_rate=top_rate))
    metadata = {
        "model": source.label,
        "fingerprint": source.fingerprint,
        "experts": anatomy.experts,
        "neuron_counts": list(counts),
        "method": "random",
        "settings": {"seed": seed, "top_rate": top_rate},
    }
    of_language = dict(zip(languages, selected, strict=True))
    return _selected_set(of_language, anatomy.layers, anatomy.neurons, metadata)


def require_prompts(method: str, prompts: Prompts | None, control: Prompts | None) -> None:
    """
    Raises:
        UsageError: prompts that the method needs are missing; the message has an example.
    """
    scorer = method_of(method)
    if scorer.reads != PROMPTS or prompts is None or (_CONTROL in scorer.moments and control is None):
        raise UsageError(f"method {method!r} needs {_needs(scorer)}")


def require_parallel(method: str, corpus: Corpus) -> None:
    """
    Raises:
        UsageError: the method compares translations and the files differ in length.
    """
    _require_parallel(method, method_of(method), {k: len(texts) for k, texts in corpus.texts.items()})


def _needs(method: type[Scorer]) -> str:
    """The required options of a method that reads no text, with an example."""
    if method.reads == CONFUSIONS:
        return "the points where answers change their language: --answers FILE of `broca ask`"
    if method.reads != PROMPTS:
        return "a neuron set to control for: --like neurons.safetensors"
    control = " and --control DIR" if _CONTROL in method.moments else ""
    return f"--prompts DIR{control}, directories of <language>.jsonl with lines like {EXAMPLE}"


def _require_parallel(name: str, method: type[Scorer], lines: Mapping[str, int]) -> None:
    if method.parallel and len(set(lines.values())) > 1:
        counts = ", ".join(f"{language} {count}" for language, count in lines.items())
        raise UsageError(
            f"method {name!r} needs parallel text, line i of every file the same text, for example NTREX-128; "
            f"the files have different numbers of lines: {counts}"
        )
