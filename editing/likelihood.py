"""How likely text is under a model: negative log-likelihoods (nats a token) and KL between two models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from editing.generation import Continuation
from neurons.batches import TokenBatch
from neurons.recording import forward
from neurons.source import LoadedModel


def _log_probabilities(loaded: LoadedModel, batch: TokenBatch) -> torch.Tensor:
    """Float32 [rows, length - 1, vocabulary]: what each position says of the next token."""
    with torch.no_grad():
        logits = loaded.model.lm_head(forward(loaded.model, batch.to(loaded.device))[:, :-1])
    return torch.log_softmax(logits.float(), dim=-1)


def mean_nll(loaded: LoadedModel, batches: Sequence[TokenBatch]) -> float:
    """Mean negative log-likelihood of the counted tokens that follow another token, nats a token."""
    total, tokens = 0.0, 0
    for batch in batches:
        log_probabilities = _log_probabilities(loaded, batch)
        wanted = batch.ids[:, 1:].to(loaded.device)
        counted = batch.counted[:, 1:].to(loaded.device)
        picked = log_probabilities.gather(-1, wanted[..., None])[..., 0]
        total -= float(picked[counted].sum(dtype=torch.float64))
        tokens += int(counted.sum())
    return total / tokens if tokens else float("nan")


def next_token_log_probabilities(
    loaded: LoadedModel, batches: Sequence[TokenBatch]
) -> Iterator[torch.Tensor]:
    """Batch by batch, float32 [counted tokens, vocabulary]: predictions of the counted tokens."""
    for batch in batches:
        yield _log_probabilities(loaded, batch)[batch.counted[:, 1:].to(loaded.device)]


def mean_kl(base: Sequence[torch.Tensor], edited: Iterator[torch.Tensor] | Sequence[torch.Tensor]) -> float:
    """Mean over positions of KL(base || edited) of the next token, in nats."""
    total, positions = 0.0, 0
    for p, q in zip(base, edited, strict=True):
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        positions += len(p)
    return total / positions if positions else float("nan")


def continuation_nll(loaded: LoadedModel, continuations: Sequence[Continuation]) -> float:
    """Mean negative log-likelihood a token of continuations read without their prompts, nats.

    The fluency gap is this of one model's continuations minus this of the unedited model's own in the
    target language, both read by the unedited model.  NaN where there is nothing to read.
    """
    start = loaded.tokenizer.bos_token_id
    rows = [([] if start is None else [start]) + list(item.ids) for item in continuations if item.ids]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        return float("nan")
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    attention = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        attention[i, : len(row)] = True
    return mean_nll(loaded, [TokenBatch(ids, attention, attention)])


def nll_by_language(loaded: LoadedModel, batches: Mapping[str, Sequence[TokenBatch]]) -> dict[str, float]:
    """``mean_nll`` of every language."""
    return {language: mean_nll(loaded, items) for language, items in batches.items()}
