"""How likely text is under a model: negative log-likelihoods (nats a token) and KL between two models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from editing.generation import Continuation
from neurons.batches import TokenBatch
from neurons.recording import forward
from neurons.source import LoadedModel

LOGIT_BYTES_AT_ONCE = 64 * 2**20


def _predictions(loaded: LoadedModel, batch: TokenBatch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(log probabilities float32 [n, vocabulary], token int64 [n]) of the counted tokens that follow
    another token, a few at a time: a batch's logits can be larger than the model."""
    head = loaded.model.get_output_embeddings()
    on_device = batch.to(loaded.device)
    with torch.no_grad():
        counted = on_device.counted[:, 1:]
        hidden = forward(loaded.model, on_device)[:, :-1][counted]
        wanted = on_device.ids[:, 1:][counted]
        rows = max(1, LOGIT_BYTES_AT_ONCE // (4 * head.weight.shape[0]))
        for some, tokens in zip(hidden.split(rows), wanted.split(rows), strict=True):
            yield torch.log_softmax(head(some).float(), dim=-1), tokens


def mean_nll(loaded: LoadedModel, batches: Sequence[TokenBatch]) -> float:
    """Mean negative log-likelihood of the counted tokens that follow another token, nats a token."""
    total, tokens = 0.0, 0
    for batch in batches:
        for log_probabilities, wanted in _predictions(loaded, batch):
            total -= float(log_probabilities.gather(-1, wanted[:, None]).sum(dtype=torch.float64))
            tokens += len(wanted)
    return total / tokens if tokens else float("nan")


def next_token_log_probabilities(
    loaded: LoadedModel, batches: Sequence[TokenBatch]
) -> Iterator[torch.Tensor]:
    """Float32 [n, vocabulary], some counted tokens at a time, in order: what was predicted for them."""
    for batch in batches:
        for log_probabilities, _ in _predictions(loaded, batch):
            yield log_probabilities


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
