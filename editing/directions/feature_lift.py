"""Causal lift of an autoencoder's features: what adding a feature does to the language of the next token.

With p the model's distribution of the token after a prompt x, and T, E the tokens of the target and of the source
language (``neurons.recording.language_lens``),

    m(x) = sum of p over T - sum of p over E
    lift_f = median over alpha of  mean over x of (m(x; alpha W_dec[f]) - m(x)) / alpha

where alpha W_dec[f] is added at the last token of x, at the autoencoder's site (Neural FOXP2, arXiv 2602.00945,
stage I).  As in the released code alpha is in units of the activation, also for an autoencoder of unit inputs; the
code tells languages' tokens by their script, which does not separate languages of one script.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from editing.directions.autoencoder import Autoencoder
from neurons.architectures.sites import Routed, SiteHook, logits, site_hooks
from neurons.errors import BrocaError
from neurons.models.next_token import positions_at_once
from neurons.models.source import LoadedModel
from neurons.recording.language_lens import token_languages
from neurons.recording.partial_forward import forward_from, forward_keeping, supports_partial_forward
from neurons.recording.text_pass import Progress, expect
from neurons.text.batches import TokenBatch, counted_tokens, row_batches
from neurons.text.sampling import even_order


def language_signs(
    loaded: LoadedModel, source: Sequence[TokenBatch], target: Sequence[TokenBatch]
) -> torch.Tensor:
    """Float64 [V]: 1 for tokens of the target, -1 for tokens of the source, else 0.

    Raises:
        BrocaError: a language without a token of its own.
    """
    languages = token_languages({"source": source, "target": target}, loaded.embedding_rows)
    signs = (languages == 1).double() - (languages == 0).double()
    for sign, name in ((-1, "source"), (1, "target")):
        if not bool((signs == sign).any()):
            raise BrocaError(f"no token is typical of the {name} language's text: give more text")
    return signs


def half_texts(batches: Sequence[TokenBatch], count: int) -> list[list[int]]:
    """Prompts: the tokens of texts up to the middle one of their counted tokens.

    Args:
        batches: one text a row.
        count: maximum number of prompts, taken evenly from the rows.
    """
    rows = []
    for batch in batches:
        for ids, counted in zip(batch.ids, batch.counted, strict=True):
            places = counted.nonzero().flatten()
            rows.append(ids[: int(places[(len(places) - 1) // 2]) + 1].tolist())
    return [rows[at] for at in even_order(len(rows))[:count]]


@torch.no_grad()
def feature_lifts(
    loaded: LoadedModel,
    autoencoder: Autoencoder,
    features: torch.Tensor,
    prompts: Sequence[Sequence[int]],
    signs: torch.Tensor,
    alphas: Sequence[float],
    progress: Progress | None = None,
) -> torch.Tensor:
    """The lift of some features, float64 [S].

    Args:
        loaded: the model.
        autoencoder: one that fits it.
        features: int64 [S].
        prompts: token ids, with start tokens.
        signs: as ``language_signs``.
        alphas: the factors.
        progress: called with the number of tokens of each pass.
    """
    model, anatomy = loaded.model, loaded.anatomy
    # The layers below the site are the same in all passes.
    start = autoencoder.layer if supports_partial_forward(model, anatomy) else 0
    changes = torch.zeros(len(features), len(alphas), dtype=torch.float64)
    batches = row_batches(prompts, uncounted=0)
    expect(progress, counted_tokens(batches) * len(features) * len(alphas))
    for batch in batches:
        batch = batch.to(loaded.device)
        rows, last = torch.arange(len(batch.ids)), (batch.attention.sum(1) - 1).cpu()
        hidden, kept = forward_keeping(model, anatomy, batch, [start] if start else [])
        before = _margin(loaded, hidden[rows, last], signs)
        for number, row in enumerate(autoencoder.decoder[features]):
            for at, alpha in enumerate(alphas):
                hook = _adding(alpha * row, rows, last)
                with site_hooks(anatomy, {(autoencoder.site, autoencoder.layer): hook}):
                    hidden = forward_from(model, anatomy, batch, start, kept)
                changes[number, at] += _margin(loaded, hidden[rows, last], signs) - before
                if progress is not None:
                    progress(int(batch.counted.sum()))
    slopes = changes / len(prompts) / torch.tensor(alphas, dtype=torch.float64)
    return slopes.quantile(0.5, dim=1)


def _adding(vector: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> SiteHook:
    def add(values: torch.Tensor, _: Routed | None) -> torch.Tensor:
        changed = values.clone()
        changed[rows, places] += vector.to(values)
        return changed

    return add


def _margin(loaded: LoadedModel, hidden: torch.Tensor, signs: torch.Tensor) -> float:
    """The sum of m over final hidden states [n, d]."""
    total = 0.0
    for vectors in hidden.split(positions_at_once(loaded.model)):
        probabilities = logits(loaded.model, vectors).double().softmax(-1).cpu()
        total += float((probabilities @ signs[: probabilities.shape[1]]).sum())
    return total
