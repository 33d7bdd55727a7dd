"""Model and corpus in, neuron set out: record what a scorer needs, score, select."""

from __future__ import annotations

from typing import Any

import torch

from neurons.batches import packed_corpus
from neurons.corpus import Corpus
from neurons.errors import UsageError
from neurons.neuron_set import NeuronSet, neuron_set
from neurons.recording import Progress, record
from neurons.scorers.gradient_contrast import gradient_contrast
from neurons.scorers.lape import lape
from neurons.source import LoadedModel
from neurons.statistics import Statistics

# method -> the moment that it scores
METHODS = {"lape": "mlp_act:positive", "gradient-contrast": "mlp_in:attribution"}


def identify(
    loaded: LoadedModel,
    corpus: Corpus,
    method: str = "lape",
    top_rate: float = 0.01,
    tokens: int | None = None,
    block: int | None = None,
    progress: Progress | None = None,
) -> NeuronSet:
    """Find language neurons.

    Args:
        loaded: the model.
        corpus: text of at least two languages.
        method: a key of ``METHODS``.
        top_rate: share of all neurons kept: over all languages together for LAPE (arXiv 2402.16438),
            for each language for gradient-contrast.
        tokens: most tokens a language; None takes all.
        block: tokens a block; None takes the model's context, at most 2048.
        progress: called with the number of tokens done.

    Raises:
        UsageError: an unknown method, too little text in a language, or a rate outside (0, 1].
    """
    if method not in METHODS:
        raise UsageError(f"method {method!r} is unknown: choose from {', '.join(METHODS)}")
    batches = packed_corpus(loaded, corpus, block, tokens)
    statistics = record(loaded, batches, [METHODS[method]], progress)
    metadata = {
        "model": loaded.label,
        "fingerprint": loaded.fingerprint,
        "method": method,
        "corpus": {"digest": corpus.digest, "part": corpus.part},
        "tokens": dict(zip(corpus.languages, statistics.tokens.tolist(), strict=True)),
        "settings": {"top_rate": top_rate, "block": int(next(iter(batches.values()))[0].ids.shape[1])},
    }
    return select(statistics, method, top_rate, metadata)


def select(statistics: Statistics, method: str, top_rate: float, metadata: dict[str, Any]) -> NeuronSet:
    """Score the statistics and keep the best neurons; LAPE's score is its entropy (less is better)."""
    values = statistics.moments[METHODS[method]]
    layers, width, _ = values.shape
    if method == "lape":
        result = lape(values, statistics.tokens, top_rate)
        metadata = {**metadata, "tau": result.tau, "bar": result.bar}
        members = {
            language: result.kept[result.member[:, k]] for k, language in enumerate(statistics.languages)
        }
        scores = {language: result.entropy[rows[:, 0], rows[:, 1]] for language, rows in members.items()}
    else:
        contrast = gradient_contrast(values, statistics.tokens, top_rate)
        members = dict(zip(statistics.languages, contrast.kept, strict=True))
        scores = {
            language: contrast.score[rows[:, 0], rows[:, 1], k]
            for k, (language, rows) in enumerate(members.items())
        }
    return neuron_set(members, scores, layers, width, metadata)


def random_neurons(chosen: NeuronSet, language: str, seed: int = 0) -> torch.Tensor:
    """The control: as many random neurons in each layer as the language has there, none of its own.

    Returns:
        int64 [n, 2], rows (layer, neuron).
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for layer, own in enumerate(chosen.by_layer(language)):
        others = torch.ones(chosen.neurons, dtype=torch.bool)
        others[own] = False
        candidates = others.nonzero()[:, 0]
        if len(candidates) < len(own):
            raise UsageError(
                f"language {language!r} has more than half of layer {layer}'s neurons: no control is left"
            )
        picked = candidates[torch.randperm(len(candidates), generator=generator)[: len(own)]].sort().values
        rows.append(torch.stack([torch.full_like(picked, layer), picked], dim=1))
    return torch.cat(rows)
