"""How many tokens of a language are read where nobody says so, how few are too few, and what was read.

The defaults are Broca's own: what the methods need on a real model to repeat a figure to about a per cent, and
no more, for reading costs a forward pass.  Published runs of LAPE count 10 to 100 million.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neurons.text.batches import TokenBatch
from neurons.text.corpus import Corpus


@dataclass(frozen=True)
class Budget:
    """What a kind of reading needs.

    Attributes:
        tokens: of each language that are read where nothing else is said.
        least: with fewer the figures say little.
    """

    tokens: int
    least: int


COUNTS = Budget(1_000_000, 2_000)  # how often a neuron fires
GRADIENTS = Budget(200_000, 1_000)
MEANS = Budget(200_000, 1_000)  # means of texts, of neurons
DIRECTIONS = Budget(100_000, 500)  # means of texts, in the residual stream
KEYS = Budget(100_000, 1_000)  # covariances
LOSSES = Budget(50_000, 200)  # likelihoods, ablation, KL


def budget_of(moments: Sequence[str], reads: str) -> Budget:
    """What a recording of these moments needs, read in "blocks" or "texts"."""
    if any(moment.endswith(":attribution") for moment in moments):
        return GRADIENTS
    return COUNTS if reads == "blocks" else MEANS


def text_read(corpus: Corpus, batches: Mapping[str, Sequence[TokenBatch]]) -> dict[str, dict[str, Any]]:
    """Language -> what was read of it.

    ``tokens`` that counted, ``texts`` of which there is one in them (None of joined text), ``of`` so many
    that are there, and ``cut``: share of the texts that were left out (None of joined text).
    """
    found = {}
    for language, some in batches.items():
        there = len(corpus.non_empty(language))
        lines = {line for batch in some if batch.lines is not None for line in batch.lines.tolist()}
        joined = any(batch.lines is None for batch in some)
        found[language] = {
            "tokens": sum(int(batch.counted.sum()) for batch in some),
            "texts": None if joined else len(lines),
            "of": there,
            "cut": None if joined else 1 - len(lines) / there if there else 0.0,
        }
    return found
