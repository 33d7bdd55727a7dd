"""Truncated Monte Carlo Shapley values of attention heads: losses of texts while heads are removed in random order.

``neurons.scorers.head_shapley`` has the formula.  A permutation removes its heads one after the other, and the head's
marginal value is the fall of v.  It ends (Ghorbani & Zou, arXiv 1904.02868) when what remains,
|v(remaining heads) - v(no head)|, is below the tolerance times |v(all heads) - v(no head)|: the heads that are left get
0.  All languages share the permutations.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from neurons.ablation.conditions import Condition, InMemory, condition_losses
from neurons.ablation.replacement import Replacement, means_of
from neurons.errors import UsageError
from neurons.models.memory import batches_for
from neurons.models.source import LoadedModel
from neurons.recording.corpus_recording import record_corpus, recording_key, recording_metadata
from neurons.recording.resume import Unfinished
from neurons.recording.text_pass import Progress
from neurons.scorers.head_shapley import MOMENTS, HeadShapley
from neurons.scorers.method import TEXTS
from neurons.statistics.statistics import Statistics
from neurons.text.batches import counted_tokens, language_batches
from neurons.text.corpus import Corpus
from neurons.text.token_budget import SHAPLEY, text_read


def marginal_values(
    value: Callable[[torch.Tensor], float], order: torch.Tensor, tolerance: float
) -> tuple[torch.Tensor, int]:
    """The marginal value of each of N players, float64 [N], and the number of players before the truncation.

    Args:
        value: v of all players without those given by index, int64 [n].
        order: int64 [N], a permutation; the players are removed in this order.
        tolerance: fraction of v(all) - v(none); 0 never truncates.
    """
    marginal = torch.zeros(len(order), dtype=torch.float64)
    before, none = value(order[:0]), value(order)
    least = tolerance * abs(before - none)
    for at, player in enumerate(order.tolist()):
        if abs(before - none) < least:
            return marginal, at
        after = value(order[: at + 1])
        marginal[player] = before - after
        before = after
    return marginal, len(order)


def record_shapley(
    loaded: LoadedModel,
    corpus: Corpus,
    method: HeadShapley,
    tokens: int | None = None,
    progress: Progress | None = None,
    out: Path | None = None,
) -> Statistics:
    """Sum marginal values of all heads over permutations.

    Args:
        loaded: the model, unchanged afterwards.
        tokens: maximum tokens of a language; None: the corpus's, else ``SHAPLEY.tokens``.  Every step of a permutation
            reads them once.
        progress: called with numbers of heads that add up to those of all permutations and languages.
        out: output file; the sums of an unfinished recording are kept beside it.

    Returns:
        Statistics with ``attn_in:shapley`` and ``attn_in:shapley_square`` [L, A, K], the number of permutations in
        ``prompts``, and in the metadata ``removed``: language -> mean number of heads before the truncation.

    Raises:
        UsageError: a model without heads that Broca understands, or a language without text.
        BrocaError: a loss that is not finite.
    """
    anatomy, languages = loaded.anatomy, corpus.languages
    anatomy.require("attn", () if anatomy.heads else range(anatomy.layers))
    places = torch.arange(anatomy.heads) < torch.tensor(anatomy.unit_counts("head"))[:, None]
    heads = places.nonzero()
    means = None
    if method.way == "mean":
        sums = record_corpus(
            loaded, corpus, ("attn_in:sum",), TEXTS, tokens or corpus.tokens or SHAPLEY.tokens
        )
        means = means_of(sums, "attn_in")
    replacement, ledger = Replacement(method.way, means), InMemory()
    size = batches_for(loaded, False, 1)[0]
    batches = language_batches(loaded, corpus, tokens, size, SHAPLEY.tokens)
    totals = torch.zeros(2, anatomy.layers, anatomy.heads, len(languages), dtype=torch.float64)
    removed = torch.zeros(len(languages), dtype=torch.int64)

    def value_of(language: str) -> Callable[[torch.Tensor], float]:
        def value(without: torch.Tensor) -> float:
            columns = anatomy.unit_columns("head", heads[without.sort().values])
            conditions = [Condition(columns, replacement, "attn_in")]
            # Only the losses with all heads and with none are needed again.
            kept = ledger if len(without) in (0, len(heads)) else None
            losses = condition_losses(loaded, {language: batches[language]}, conditions, kept, whole=True)
            return -float(losses.sums[language].sum()) / int(losses.tokens[language].sum())

        return value

    for language, of_language in batches.items():
        if not of_language:
            raise UsageError(f"language {language!r} has no text of two tokens or more")
    unfinished, done = None, 0
    if out is not None:
        unfinished = Unfinished(out, recording_key(loaded, batches, [*MOMENTS, str(method)]))
        done, state = unfinished.load()
        if state:
            totals, removed = state["totals"], state["removed"]
            if progress is not None:
                progress(done * len(heads))
    generator = torch.Generator().manual_seed(method.seed)
    for number in range(method.permutations):
        order = torch.randperm(len(heads), generator=generator)
        for k, language in enumerate(languages):
            step = number * len(languages) + k
            if step < done:
                continue
            marginal, count = marginal_values(value_of(language), order, method.tolerance)
            totals[0, ..., k][places] += marginal
            totals[1, ..., k][places] += marginal.square()
            removed[k] += count
            if progress is not None:
                progress(len(heads))
            if unfinished is not None and unfinished.is_due():
                unfinished.save(step + 1, {"totals": totals, "removed": removed})
    counts = torch.full((len(languages),), method.permutations)
    statistics = Statistics(
        languages=languages,
        tokens=torch.tensor([counted_tokens(of_language) for of_language in batches.values()]),
        texts=torch.tensor([sum(len(b.ids) for b in of_language) for of_language in batches.values()]),
        moments=dict(zip(MOMENTS, totals.unbind(), strict=True)),
        fingerprint=loaded.fingerprint,
        prompts={name.partition(":")[2]: counts.clone() for name in MOMENTS},
    )
    read = text_read(corpus, batches)
    statistics.metadata.update(
        recording_metadata(loaded, corpus, statistics, TEXTS, None, size, {}, read, False),
        removed=dict(zip(languages, (removed / method.permutations).tolist(), strict=True)),
    )
    return statistics
