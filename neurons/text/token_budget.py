"""Token budgets: default and minimum tokens of each language by kind of measurement, and what was read.

The defaults are Broca's own: about as many as the methods need on a real model to reproduce a figure within a per
cent.  Published runs of LAPE count 10 to 100 million.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neurons.text.batches import TokenBatch, counted_tokens
from neurons.text.corpus import Corpus


@dataclass(frozen=True)
class Budget:
    """The tokens that a kind of measurement needs.

    Attributes:
        tokens: default number of tokens read of each language.
        minimum: with fewer tokens the figures are unreliable.
    """

    tokens: int
    minimum: int


COUNTS = Budget(1_000_000, 2_000)  # how often a neuron fires
GRADIENTS = Budget(200_000, 1_000)
MEANS = Budget(200_000, 1_000)  # of neurons over texts
DIRECTIONS = Budget(100_000, 500)  # means over texts in the residual stream
KEYS = Budget(100_000, 1_000)  # covariances
LOSSES = Budget(50_000, 200)  # likelihoods, ablation, KL
SHAPLEY = Budget(2_000, 200)  # read once for each head and permutation


def budget_of(moments: Sequence[str], reads: str) -> Budget:
    """The budget of a recording of these moments from "blocks" or "texts"."""
    if any(moment.endswith(":attribution") for moment in moments):
        return GRADIENTS
    if any(moment.endswith(":shapley") for moment in moments):
        return SHAPLEY
    return COUNTS if reads == "blocks" else MEANS


def text_read(corpus: Corpus, batches: Mapping[str, Sequence[TokenBatch]]) -> dict[str, dict[str, Any]]:
    """Language -> what was read of it.

    ``tokens``: counted tokens; ``texts``: texts with a counted token (None for packed text); ``of``: texts in the
    corpus; ``cut``: fraction of the texts that was not read (None for packed text).
    """
    read = {}
    for language, of_language in batches.items():
        count = len(corpus.non_empty(language))
        lines = {line for batch in of_language if batch.lines is not None for line in batch.lines.tolist()}
        packed = any(batch.lines is None for batch in of_language)
        read[language] = {
            "tokens": counted_tokens(of_language),
            "texts": None if packed else len(lines),
            "of": count,
            "cut": None if packed else 1 - len(lines) / count if count else 0.0,
        }
    return read
