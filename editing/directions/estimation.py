"""Estimate a direction from a model and a corpus with any method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from editing.directions.autoencoder import Autoencoder, LanguageFeatures
from editing.directions.diffmean import INPUT_SITES, OUTPUT_SITES, DiffMean, diffmean_direction
from editing.directions.direction import Direction
from editing.directions.length import along, unit, without_neutral
from editing.directions.low_rank_shift import window
from editing.directions.method import DirectionMethod
from editing.directions.recorded import Recorded, record_texts
from editing.directions.registry import method_of
from editing.directions.sae_recording import require_fit
from editing.directions.texts import Estimate, Texts
from editing.directions.winsorise import require_quantile, winsorise
from neurons.errors import BrocaError, UsageError
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Progress
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus
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
    estimator = method_of(method).of(settings or {})
    _require_languages(corpus, source, target)
    if estimator.parallel:
        _require_parallel(method, corpus, source, target)
    if winsorised is not None:
        require_quantile(winsorised)
    if estimator.autoencoders != bool(autoencoders):
        raise UsageError(
            f"method {method!r} needs an autoencoder: give --sae PATH (SAE-Lens, Gemma-Scope or `broca sae`)"
            if estimator.autoencoders
            else f"method {method!r} does not use an autoencoder: leave --sae out, or use --method sae"
        )
    for sae in autoencoders:
        require_fit(loaded, sae)
    plain = winsorised is None and not project_neutral and not unit_length and tokens is None
    if isinstance(estimator, DiffMean) and plain:
        return diffmean_direction(loaded, corpus, source, target, progress)
    languages = corpus.languages if estimator.all_languages else (source, target)
    read = corpus.only(*languages)
    batches = language_batches(loaded, read, tokens, default=DIRECTIONS.tokens)
    recorded = record_texts(loaded, batches, progress)
    by_place: Mapping[tuple[str, int], Estimator] = {}
    notes: dict[str, Any] = {}
    if estimator.autoencoders:
        features = estimator.read(loaded, batches, source, target, autoencoders, progress)
        by_place = _by_autoencoders(estimator, autoencoders, features, loaded.anatomy.layers)
        notes["autoencoders"] = [
            {"name": sae.name, "layer": sae.layer, "site": sae.site, "features": of_sae.features.tolist()}
            | of_sae.notes
            for sae, of_sae in zip(autoencoders, features, strict=True)
        ]
    places = [(site, layer) for site in OUTPUT_SITES for layer in range(loaded.anatomy.layers)]
    results: dict[tuple[str, int], Estimate] = {}
    for site, layer in places:
        if site != "block_out" and not loaded.anatomy.has(layer, site.removesuffix("_out")):
            results[site, layer] = Estimate(torch.zeros(loaded.anatomy.residual, dtype=torch.float64))
            continue
        texts = _texts(recorded, source, target, site, layer, estimator.parallel, winsorised)
        at_place = by_place.get((site, layer), estimator.estimate)
        try:
            estimate = at_place(texts)
        except BrocaError as error:
            raise type(error)(f"{error} (at {site} of layer {layer})") from error
        vector = estimate.vector
        cosine = float(unit(vector) @ unit(texts.diffmean))
        if project_neutral:
            s, t = languages.index(source), languages.index(target)
            vector = without_neutral(vector, (texts.means[s] + texts.means[t]) / 2)
        if unit_length:
            vector = unit(vector)
        results[site, layer] = Estimate(vector, estimate.basis, {**estimate.measures, "cosine": cosine})
    metadata = {
        "model": loaded.label,
        "fingerprint": loaded.fingerprint,
        **loaded.provenance,
        "method": method,
        "corpus": corpus.provenance,
        "tokens": dict(zip(recorded.languages, recorded.tokens.tolist(), strict=True)),
        "texts": recorded.texts,
        "settings": {
            **asdict(estimator),
            "winsorised": winsorised,
            "project_neutral": project_neutral,
            "unit_length": unit_length,
            "most_tokens": tokens,
        },
        "read": text_read(read, batches),
        **notes,
    }
    return _assembled(source, target, results, recorded, metadata)


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
        values = {language: winsorise(of_texts, winsorised) for language, of_texts in values.items()}
        means = torch.stack([values[language].mean(0) for language in recorded.languages])
    s, t = recorded.languages.index(source), recorded.languages.index(target)
    differences = None
    if parallel:
        at_source, at_target = recorded.common(source, target)
        differences = values[target][at_target] - values[source][at_source]
    return Texts(values[source], values[target], differences, means[t] - means[s], means)


def _by_autoencoders(
    method: DirectionMethod,
    autoencoders: Sequence[Autoencoder],
    features: Sequence[LanguageFeatures],
    layers: int,
) -> dict[tuple[str, int], Estimator]:
    """At an autoencoder's site its estimate, elsewhere the line of the nearest; of two the lower layer's."""
    by_layer = sorted(range(len(autoencoders)), key=lambda at: autoencoders[at].layer)
    estimators: dict[tuple[str, int], Estimator] = {}
    for site in OUTPUT_SITES:
        for layer in range(layers):
            nearest = min(
                by_layer,
                key=lambda at: (abs(autoencoders[at].layer - layer), autoencoders[at].site != site),
            )
            sae = autoencoders[nearest]
            is_site = (sae.site, sae.layer) == (site, layer)
            estimators[site, layer] = partial(_estimate, method, features[nearest], is_site)
    return estimators


def _estimate(method: DirectionMethod, features: LanguageFeatures, is_site: bool, texts: Texts) -> Estimate:
    estimate = (
        method.estimate_at(features, texts)
        if is_site
        else Estimate(along(unit(features.vector), texts.diffmean))
    )
    return replace(estimate, measures={**estimate.measures, "read": float(is_site)})


def _require_languages(corpus: Corpus, source: str, target: str) -> None:
    corpus.require(source, target)
    if source == target:
        raise UsageError(f"source and target are both {source!r}")


def _require_parallel(method: str, corpus: Corpus, source: str, target: str) -> None:
    lines = {language: len(corpus.texts[language]) for language in (source, target)}
    if len(set(lines.values())) > 1:
        counts = ", ".join(f"{language} {count}" for language, count in lines.items())
        raise UsageError(
            f"method {method!r} needs parallel text, line i of both files the same text, for example NTREX-128; "
            f"the files have different numbers of lines: {counts}"
        )
