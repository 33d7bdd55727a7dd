"""Estimate a direction from a model and a corpus, or preferences, with any method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from editing.directions.autoencoder import Autoencoder
from editing.directions.diffmean import INPUT_SITES, OUTPUT_SITES, DiffMean, diffmean_direction
from editing.directions.direction import Direction
from editing.directions.length import along, unit, without_neutral
from editing.directions.low_rank_shift import window
from editing.directions.method import DirectionMethod, Given, PreferenceMethod
from editing.directions.recorded import Recorded, record_texts
from editing.directions.registry import method_of
from editing.directions.sae_recording import require_fit
from editing.directions.texts import Estimate, Texts
from editing.directions.winsorise import require_quantile, winsorise
from neurons.errors import BrocaError, UsageError
from neurons.models.memory import common_batches
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Progress
from neurons.text.batches import (
    TokenBatch,
    common_tokens,
    counted_tokens,
    language_batches,
    token_row_batches,
)
from neurons.text.corpus import Corpus
from neurons.text.preferences import CHOSEN, REJECTED, Preferences, preference_rows
from neurons.text.token_budget import DIRECTIONS, text_read

Estimator = Callable[[Texts], Estimate]


def direction_of(
    loaded: LoadedModel,
    corpus: Corpus,
    source: str,
    target: str,
    method: str = DiffMean.name,
    *,
    winsorised: float | None = None,
    project_neutral: bool = False,
    unit_length: bool = False,
    tokens: int | None = None,
    settings: Mapping[str, Any] | None = None,
    autoencoders: Sequence[Autoencoder] = (),
    progress: Progress | None = None,
) -> Direction:
    """Estimate a direction.

    Args:
        loaded: the model.
        corpus: text of source and target; language-subspace reads its other languages too.
        source: language name.
        target: language name.
        method: a key of ``editing.directions.registry.METHODS``.
        winsorised: clip each coordinate of the texts' means to the quantiles 1 - q to q
            (``editing.directions.winsorise``); None does not clip.  The inputs' means are never clipped.
        project_neutral: remove the component along the mean of both languages from each vector
            (``editing.directions.length``); subspaces are unchanged.
        unit_length: vectors of length 1 instead of the method's length.
        tokens: maximum tokens a language; None: the corpus's, else ``DIRECTIONS.tokens``.
        settings: of the method; the others keep their defaults.
        autoencoders: for a method that reads them.
        progress: called with the number of tokens of each batch.

    Returns:
        A direction with vectors at attn_out, mlp_out and block_out of every layer and the inputs' means;
        ``metadata["measures"]`` holds, by site and layer, the method's measures and the ``cosine`` of its
        vector with DiffMean before the neutral mean is removed.

    Raises:
        UsageError: an unknown method, language or setting, text that is not parallel for a method that needs
            it, or missing, unfit or unused autoencoders.
        BrocaError: languages that do not differ, or a method without a result.
    """
    estimator = checked_method(method, corpus, (source, target), winsorised, settings, autoencoders)
    for sae in autoencoders:
        require_fit(loaded, sae)
    if not keeps_texts(type(estimator), tokens, winsorised, project_neutral, unit_length):
        return diffmean_direction(loaded, corpus, source, target, progress)
    languages = corpus.languages if estimator.all_languages else (source, target)
    read = corpus.only(*languages)
    batches = language_batches(loaded, read, tokens, common_tokens(loaded), DIRECTIONS.tokens)
    given: list[Given] = []
    notes: dict[str, Any] = {}
    if estimator.autoencoders:
        features = estimator.read(loaded, batches, source, target, autoencoders, progress)
        given = [
            Given(sae.site, sae.layer, of_sae.vector, partial(estimator.estimate_at, of_sae))
            for sae, of_sae in zip(autoencoders, features, strict=True)
        ]
        notes["autoencoders"] = [
            {"name": sae.name, "layer": sae.layer, "site": sae.site, "features": of_sae.features.tolist()}
            | of_sae.notes
            for sae, of_sae in zip(autoencoders, features, strict=True)
        ]
    metadata = {"corpus": corpus.provenance, "read": text_read(read, batches), **notes}
    length = _Length(winsorised, project_neutral, unit_length)
    return _estimated(
        loaded, batches, (source, target), estimator, given, length, metadata, progress, most_tokens=tokens
    )


def keeps_texts(
    method: type[DirectionMethod],
    tokens: int | None = None,
    winsorised: float | None = None,
    project_neutral: bool = False,
    unit_length: bool = False,
) -> bool:
    """Whether ``direction_of`` keeps the means of every text: plain DiffMean needs only their sums."""
    changed = winsorised is not None or project_neutral or unit_length
    return method is not DiffMean or changed or tokens is not None


def direction_of_preferences(
    loaded: LoadedModel,
    preferences: Preferences,
    method: str,
    source: str = REJECTED,
    target: str = CHOSEN,
    *,
    winsorised: float | None = None,
    project_neutral: bool = False,
    unit_length: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Direction:
    """Estimate a direction from rejected to chosen answers.

    A method that reads text reads the positions that predict a token of the answers, of the rejected ones as its source
    and of the chosen ones as its target.

    Args:
        loaded: the model.
        preferences: prompts with two answers.
        method: a key of ``editing.directions.registry.METHODS``.
        source: name of the rejected answers, for example their language.
        target: name of the chosen answers.
        winsorised: as in ``direction_of``.
        project_neutral: as in ``direction_of``.
        unit_length: as in ``direction_of``.
        settings: as in ``direction_of``.
        progress: called with the number of preferences, or tokens, that are done.

    Raises:
        UsageError: as ``direction_of`` and ``preference_rows``, or a method that needs an autoencoder.
        BrocaError: as ``direction_of``, or nothing was learned.
    """
    estimator = checked_method(method, None, (source, target), winsorised, settings)
    rows = preference_rows(loaded, preferences)
    given: list[Given] = []
    notes: dict[str, Any] = {}
    if isinstance(estimator, PreferenceMethod):
        given, notes = estimator.given(loaded, rows, progress)
    longest = max(len(row.ids) for of_kind in rows.values() for row in of_kind)
    at_once = common_batches(loaded, False, longest)[0]
    batches = {
        name: token_row_batches(rows[kind], 0, at_once)
        for name, kind in ((source, REJECTED), (target, CHOSEN))
    }
    count = len(preferences.of)
    read = {
        name: {"tokens": counted_tokens(of_kind), "texts": count, "of": count, "cut": 0.0}
        for name, of_kind in batches.items()
    }
    metadata = {"preferences": preferences.digest, "read": read, **notes}
    length = _Length(winsorised, project_neutral, unit_length)
    return _estimated(loaded, batches, (source, target), estimator, given, length, metadata, progress)


def checked_method(
    method: str,
    corpus: Corpus | None,
    pair: tuple[str, str],
    winsorised: float | None = None,
    settings: Mapping[str, Any] | None = None,
    autoencoders: Sequence[Autoencoder] = (),
) -> DirectionMethod:
    """The method, after all checks that need no model.

    Args:
        method: as in ``direction_of``.
        corpus: text; None: preferences.
        pair: source and target.
        winsorised: as in ``direction_of``.
        settings: as in ``direction_of``.
        autoencoders: as in ``direction_of``.

    Raises:
        UsageError: as ``direction_of`` and ``direction_of_preferences``, except for autoencoders that do not fit the model.
    """
    estimator = method_of(method).of(settings or {})
    if corpus is None and estimator.autoencoders:
        raise UsageError(f"method {method!r} reads text: give --corpus instead of --preferences")
    if corpus is not None and isinstance(estimator, PreferenceMethod):
        raise UsageError(
            f"method {method!r} reads preferences: give them (--preferences) instead of a corpus"
        )
    if corpus is not None:
        corpus.require(*pair)
    if pair[0] == pair[1]:
        raise UsageError(f"source and target are both {pair[0]!r}")
    if corpus is not None and estimator.parallel:
        _require_parallel(method, corpus, *pair)
    if winsorised is not None:
        require_quantile(winsorised)
    if estimator.autoencoders != bool(autoencoders):
        raise UsageError(
            f"method {method!r} needs an autoencoder: give --sae PATH (SAE-Lens, Gemma-Scope or `broca sae`)"
            if estimator.autoencoders
            else f"method {method!r} does not use an autoencoder: leave --sae out, or use --method sae"
        )
    return estimator


@dataclass(frozen=True)
class _Length:
    """What changes the estimates of any method, as in ``direction_of``."""

    winsorised: float | None
    project_neutral: bool
    unit_length: bool


def _estimated(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    pair: tuple[str, str],
    method: DirectionMethod,
    given: Sequence[Given],
    length: _Length,
    metadata: Mapping[str, Any],
    progress: Progress | None,
    **settings: Any,
) -> Direction:
    """Record the batches and estimate at every site of every layer.

    Args:
        pair: source and target.
        given: the method's own vectors; empty: it estimates them from the texts.
    """
    source, target = pair
    recorded = record_texts(loaded, batches, progress)
    by_place = _by_given(given, loaded.anatomy.layers) if given else {}
    places = [(site, layer) for site in OUTPUT_SITES for layer in range(loaded.anatomy.layers)]
    results: dict[tuple[str, int], Estimate] = {}
    for site, layer in places:
        if site != "block_out" and not loaded.anatomy.has(layer, site.removesuffix("_out")):
            results[site, layer] = Estimate(torch.zeros(loaded.anatomy.residual, dtype=torch.float64))
            continue
        texts = _texts(recorded, source, target, site, layer, method.parallel, length.winsorised)
        at_place = by_place.get((site, layer), method.estimate)
        try:
            estimate = at_place(texts)
        except BrocaError as error:
            raise type(error)(f"{error} (at {site} of layer {layer})") from error
        vector = estimate.vector
        cosine = float(unit(vector) @ unit(texts.diffmean))
        if length.project_neutral:
            s, t = recorded.languages.index(source), recorded.languages.index(target)
            vector = without_neutral(vector, (texts.means[s] + texts.means[t]) / 2)
        if length.unit_length:
            vector = unit(vector)
        results[site, layer] = Estimate(vector, estimate.basis, {**estimate.measures, "cosine": cosine})
    described = {
        "model": loaded.label,
        "fingerprint": loaded.fingerprint,
        **loaded.provenance,
        "method": method.name,
        "tokens": dict(zip(recorded.languages, recorded.tokens.tolist(), strict=True)),
        "texts": recorded.texts,
        "settings": {**asdict(method), **asdict(length), **settings},
        **metadata,
    }
    return _assembled(source, target, results, recorded, described)


def _assembled(
    source: str,
    target: str,
    results: Mapping[tuple[str, int], Estimate],
    recorded: Recorded,
    metadata: dict[str, Any],
) -> Direction:
    layers = 1 + max(layer for _, layer in results)
    measures: dict[str, dict[str, list[float]]] = {}
    vectors, subspaces = {}, {}
    for site in OUTPUT_SITES:
        estimates = [results[site, layer] for layer in range(layers)]
        vectors[site] = torch.stack([estimate.vector for estimate in estimates])
        # A layer without the module has no measures, and an empty basis.
        names = dict.fromkeys(name for estimate in estimates for name in estimate.measures)
        measures[site] = {
            name: [estimate.measures.get(name, 0.0) for estimate in estimates] for name in names
        }
        if any(estimate.basis is not None for estimate in estimates):
            empty = torch.zeros(len(estimates[0].vector), 0, dtype=torch.float64)
            subspaces[site] = _padded([empty if e.basis is None else e.basis for e in estimates])
    windows = {
        site: list(window([m * s for m, s in zip(of["mass"], of["stability"], strict=True)]))
        for site, of in measures.items()
        if "stability" in of
    }
    return Direction(
        source=source,
        target=target,
        vectors=vectors,
        input_means={
            site: ((recorded.mean(site, source) + recorded.mean(site, target)) / 2).contiguous()
            for site in INPUT_SITES
        },
        metadata={**metadata, "measures": measures, **({"window": windows} if windows else {})},
        subspaces=subspaces,
    )


def _padded(bases: Sequence[torch.Tensor]) -> torch.Tensor:
    """[L, d, largest rank], with zeros beyond the rank of a layer."""
    rank = max(basis.shape[1] for basis in bases)
    padded = torch.zeros(len(bases), bases[0].shape[0], rank, dtype=torch.float64)
    for into, basis in zip(padded, bases, strict=True):
        into[:, : basis.shape[1]] = basis
    return padded


def _texts(
    recorded: Recorded,
    source: str,
    target: str,
    site: str,
    layer: int,
    parallel: bool,
    winsorised: float | None,
) -> Texts:
    values = {language: outputs[site][:, layer].double() for language, outputs in recorded.outputs.items()}
    means = recorded.means[site][layer].T
    if winsorised is not None:
        clipped = {language: winsorise(of_texts, winsorised) for language, of_texts in values.items()}
        # Not the means of the clipped texts: of a text in several rows, each row counts as a text.
        means = means + torch.stack([clipped[k].mean(0) - values[k].mean(0) for k in recorded.languages])
        values = clipped
    s, t = recorded.languages.index(source), recorded.languages.index(target)
    differences = None
    if parallel:
        at_source, at_target = recorded.common(source, target)
        differences = values[target][at_target] - values[source][at_source]
    return Texts(values[source], values[target], differences, means[t] - means[s], means)


def _by_given(given: Sequence[Given], layers: int) -> dict[tuple[str, int], Estimator]:
    """At the place of a vector its estimate, elsewhere the line of the nearest; of two the lower layer's."""
    by_layer = sorted(given, key=lambda one: one.layer)
    estimators: dict[tuple[str, int], Estimator] = {}
    for site in OUTPUT_SITES:
        for layer in range(layers):
            nearest = min(by_layer, key=lambda one: (abs(one.layer - layer), one.site != site))
            is_place = (nearest.site, nearest.layer) == (site, layer)
            estimators[site, layer] = partial(_given, nearest, is_place)
    return estimators


def _given(given: Given, is_place: bool, texts: Texts) -> Estimate:
    estimate = given.at_place(texts) if is_place else Estimate(along(unit(given.vector), texts.diffmean))
    return replace(estimate, measures={**estimate.measures, "read": float(is_place)})


def _require_parallel(method: str, corpus: Corpus, source: str, target: str) -> None:
    lines = {language: len(corpus.texts[language]) for language in (source, target)}
    if len(set(lines.values())) > 1:
        counts = ", ".join(f"{language} {count}" for language, count in lines.items())
        raise UsageError(
            f"method {method!r} needs parallel text, line i of both files the same text, for example NTREX-128; "
            f"the files have different numbers of lines: {counts}"
        )
