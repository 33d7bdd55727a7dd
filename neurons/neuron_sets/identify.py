"""Statistics or a model in, neuron set out: score, select, and say how it was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from neurons.errors import UsageError
from neurons.models.source import LoadedModel, ModelSource
from neurons.neuron_sets.neuron_set import NeuronSet, neuron_set
from neurons.recording.answers import record_answers
from neurons.recording.answers import together as side_by_side
from neurons.recording.corpus_recording import record_corpus
from neurons.recording.text_pass import Progress
from neurons.scorers.method import PROMPTS, Scorer
from neurons.scorers.random_control import random_like, random_matched, random_scores
from neurons.scorers.registry import method_of
from neurons.scorers.selection import Selection, select
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
    """Find language neurons in text.

    Args:
        loaded: the model.
        corpus: text of at least two languages.
        method: a key of ``neurons.scorers.registry.METHODS`` that reads text.
        top_rate: share of all neurons kept; None takes the method's own.
        tokens: most tokens a language; None takes all.
        block: tokens a block; None takes the model's context, at most 2048.
        progress: called with the number of tokens done.
        settings: of the scorer, those that differ from the published.
        selection: fields of ``Selection`` that differ from the method's own.
        out: where the set will be written: an unfinished recording is kept beside it.

    Raises:
        UsageError: an unknown method or one that reads no text, too little text in a language, text that
            is not parallel where it must be, or a rate outside (0, 1].
    """
    chosen = method_of(method)
    if chosen.control or chosen.reads == PROMPTS:
        raise UsageError(f"method {method!r} does not read text: it needs {_needs(chosen)}")
    require_parallel(method, corpus)
    statistics = record_corpus(
        loaded, corpus, chosen.moments, chosen.reads, tokens, block, progress=progress, out=out
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
    """Find language neurons by prompts with answers.

    Args:
        prompts: of at least two languages.
        method: "culnig" or "integrated-gradients".
        control: culnig's: the options without the question.
        recognition: culnig's second control, where there is one.

    Raises:
        UsageError: prompts that the method needs are missing.
    """
    chosen = method_of(method)
    require_prompts(method, prompts, control)
    needs_control = _CONTROL in chosen.moments
    given = {
        "answer" if needs_control else "integrated": prompts,
        **({"answer_control": control} if needs_control else {}),
        **({"answer_recognition": recognition} if recognition is not None else {}),
    }
    recorded = [
        record_answers(loaded, some, moment, progress=progress)
        for moment, some in given.items()
        if some is not None
    ]
    statistics = side_by_side(recorded)
    statistics.metadata.update(
        model=loaded.label,
        layers=loaded.anatomy.layers,
        neurons=loaded.anatomy.neurons,
        experts=loaded.anatomy.experts,
        prompts={moment: some.digest for moment, some in given.items() if some is not None},
        **loaded.told,
    )
    return neurons_from(statistics, method, top_rate, settings, selection)


def neurons_from(
    statistics: Statistics,
    method: str,
    top_rate: float | None = None,
    settings: Mapping[str, Any] | None = None,
    selection: Mapping[str, Any] | None = None,
) -> NeuronSet:
    """Score recorded statistics and choose neurons; no model is needed.

    Args:
        statistics: that hold what the method needs.
        method: a key of ``neurons.scorers.registry.METHODS``.
        top_rate: share of all neurons kept; None takes the method's own.
        settings: of the scorer, those that differ from the published.
        selection: fields of ``Selection`` that differ from the method's own.

    Raises:
        UsageError: an unknown method or setting, statistics that lack what it needs, or a top rate that
            keeps no neuron.
    """
    chosen = method_of(method)
    if chosen.control:
        raise UsageError(
            f"method {method!r} follows another neuron set: give it with --like neurons.safetensors"
        )
    for corpus in statistics.metadata.get("corpora", []):
        _require_parallel(method, chosen, corpus.get("lines", {}))
    rate = chosen.selection.top_rate if top_rate is None else top_rate
    how = chosen.selection.changed(top_rate=rate, **(selection or {}))
    scores = chosen.of(settings or {}).scores(statistics, how.top_rate)
    found = select(scores, how.changed(top_rate=1.0) if chosen.rate_in_score else how)
    layers, width, _ = scores.values.shape
    if round(how.top_rate * layers * width) == 0:
        raise UsageError(
            f"the top rate {how.top_rate} keeps none of {layers * width:,} neurons: take at least "
            f"{1 / (layers * width):.1g}"
        )
    languages = statistics.languages
    metadata = {
        **{key: value for key, value in statistics.metadata.items() if key not in ("settings", "unknown")},
        "fingerprint": statistics.fingerprint,
        "method": method,
        "tokens": dict(zip(languages, statistics.tokens.tolist(), strict=True)),
        "settings": {**asdict(chosen.of(settings or {})), **how.as_json()},
        "recording": statistics.metadata.get("settings", {}),
        "notes": scores.notes,
    }
    return neuron_set(
        {language: one.rows for language, one in zip(languages, found, strict=True)},
        {language: one.scores for language, one in zip(languages, found, strict=True)},
        layers,
        width,
        metadata,
        {language: one.kinds for language, one in zip(languages, found, strict=True)},
    )


def random_set(like: NeuronSet, seed: int = 0, statistics: Statistics | None = None) -> NeuronSet:
    """The control of a neuron set: for each language as many random neurons in each layer, none of its own.

    Args:
        like: the set.
        seed: of the draw.
        statistics: with ``mlp_in:absolute``: the control is then alike in activity too.

    Raises:
        UsageError: a layer without enough other neurons, or statistics of another model.
    """
    members = {}
    for k, language in enumerate(like.languages):
        rows = like.of(language)
        if statistics is None:
            members[language] = random_like(rows, like.layers, like.neurons, seed * len(like.languages) + k)
        else:
            # Activity over all languages together: what is matched must not be the language itself.
            # Where an expert saw no token, nothing was active.
            seen = statistics.seen().sum(-1).clamp(min=1)
            activity = statistics.moment("mlp_in:absolute").sum(-1) / seen
            members[language] = random_matched(rows, activity, seed * len(like.languages) + k)
    metadata = {
        **{
            k: v
            for k, v in like.metadata.items()
            if k in ("model", "fingerprint", "layers", "neurons", "experts")
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


def random_of(source: ModelSource, languages: tuple[str, ...], top_rate: float, seed: int = 0) -> NeuronSet:
    """Random neurons for some languages of a model, without a set to follow."""
    anatomy = source.anatomy
    scores = random_scores(anatomy.layers, anatomy.neurons, len(languages), seed)
    found = select(scores, Selection(top_rate=top_rate))
    metadata = {
        "model": source.label,
        "fingerprint": source.fingerprint,
        "experts": anatomy.experts,
        "method": "random",
        "settings": {"seed": seed, "top_rate": top_rate},
    }
    return neuron_set(
        {language: one.rows for language, one in zip(languages, found, strict=True)},
        {language: one.scores for language, one in zip(languages, found, strict=True)},
        anatomy.layers,
        anatomy.neurons,
        metadata,
        {language: one.kinds for language, one in zip(languages, found, strict=True)},
    )


def require_prompts(method: str, prompts: Prompts | None, control: Prompts | None) -> None:
    """
    Raises:
        UsageError: prompts that the method needs are missing; with an example.
    """
    chosen = method_of(method)
    if prompts is None or (_CONTROL in chosen.moments and control is None):
        raise UsageError(f"method {method!r} needs {_needs(chosen)}")


def require_parallel(method: str, corpus: Corpus) -> None:
    """
    Raises:
        UsageError: the method compares translations and the files differ in length; with an example.
    """
    _require_parallel(method, method_of(method), {k: len(texts) for k, texts in corpus.texts.items()})


def _needs(method: type[Scorer]) -> str:
    """What a method that reads no text is to be given, with an example."""
    if method.reads != PROMPTS:
        return "a neuron set to follow: --like neurons.safetensors"
    control = " and --control DIR" if _CONTROL in method.moments else ""
    return f"--prompts DIR{control}, directories of <language>.jsonl with lines like {EXAMPLE}"


def _require_parallel(name: str, method: type[Scorer], lines: Mapping[str, int]) -> None:
    if method.parallel and len(set(lines.values())) > 1:
        counts = ", ".join(f"{language} {count}" for language, count in lines.items())
        raise UsageError(
            f"method {name!r} needs parallel text, line i of every file the same text, for example NTREX-128; "
            f"here the files have different numbers of lines: {counts}"
        )
