"""How likely text is under a model: negative log-likelihoods (nats a token) and KL between two models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from editing.evaluation.generation import Continuation
from neurons.architectures.offload import parameter_value
from neurons.models.next_token import Head, token_divergences, token_losses
from neurons.models.source import LoadedModel
from neurons.models.start_tokens import start_tokens
from neurons.recording.text_pass import forward
from neurons.text.batches import TokenBatch, row_batches

Steering = Callable[[], AbstractContextManager[None]]


def _hidden(loaded: LoadedModel, batch: TokenBatch) -> torch.Tensor:
    """[n, d]: the final hidden states from which the counted tokens that follow another are predicted."""
    on_device = batch.to(loaded.device)
    with torch.no_grad():
        return forward(loaded.model, on_device)[:, :-1][on_device.counted[:, 1:]]


def mean_nll(loaded: LoadedModel, batches: Sequence[TokenBatch]) -> float:
    """Mean negative log-likelihood of the counted tokens that follow another token, nats a token."""
    return read_unedited(loaded, batches, keep=False).nll


def _loss_sum(loaded: LoadedModel, batch: TokenBatch, hidden: torch.Tensor) -> float:
    wanted = batch.ids[:, 1:][batch.counted[:, 1:]]
    return float(token_losses(loaded.model, hidden, wanted).sum(dtype=torch.float64))


@dataclass(frozen=True)
class UneditedText:
    """What the unedited model makes of some text.

    Attributes:
        batches: the text.
        nll: nats a token; NaN where there is none.
        hidden: of each batch [n, d], the final hidden states from which the counted tokens that follow another are
            predicted; None where they were not kept.
        head: the unedited model's output embeddings, which a context may exchange.
    """

    batches: Sequence[TokenBatch]
    nll: float
    hidden: tuple[torch.Tensor, ...] | None
    head: Head


def read_unedited(loaded: LoadedModel, batches: Sequence[TokenBatch], keep: bool = True) -> UneditedText:
    """One pass over text with the model as it is now; ``keep`` its hidden states, to take KL from."""
    head = partial(torch.nn.functional.linear, **_held(loaded.model.get_output_embeddings(), loaded.device))
    total, tokens = 0.0, 0
    kept: list[torch.Tensor] = []
    for batch in batches:
        hidden = _hidden(loaded, batch)
        total += _loss_sum(loaded, batch, hidden)
        tokens += len(hidden)
        if keep:
            kept.append(hidden)
    nll = total / tokens if tokens else float("nan")
    return UneditedText(batches, nll, tuple(kept) if keep else None, head)


def read_again(
    loaded: LoadedModel, text: UneditedText, nll: bool = True, kl: bool = True
) -> tuple[float, float]:
    """One pass over the same text with the model as it is now, steered.

    Only final hidden states are kept between the two passes; logits are made a few at a time.

    Args:
        loaded: the model.
        text: with hidden states, where KL is wanted.
        nll: whether the loss is wanted.
        kl: whether the divergence is wanted.

    Returns:
        Nats a token, and the mean over the counted tokens of KL(unedited || steered) of what is predicted for them;
        NaN what is not wanted, or where there is no token.
    """
    losses, divergences, tokens = 0.0, 0.0, 0
    for i, batch in enumerate(text.batches):
        hidden = _hidden(loaded, batch)
        tokens += len(hidden)
        if nll:
            losses += _loss_sum(loaded, batch, hidden)
        if kl:
            assert text.hidden is not None
            divergences += float(token_divergences(loaded.model, text.hidden[i], hidden, text.head).sum())
    none = float("nan")
    return losses / tokens if tokens and nll else none, divergences / tokens if tokens and kl else none


def mean_kl(loaded: LoadedModel, batches: Sequence[TokenBatch], steering: Steering) -> float:
    """Mean KL of some text, as ``read_again``, between the model as it is now and while ``steering()`` is entered."""
    before = read_unedited(loaded, batches)
    with steering():
        return read_again(loaded, before, nll=False)[1]


def _held(head: Any, where: torch.device) -> dict[str, Any]:
    """The weight and bias of a module on a device, wherever they are or wait."""
    names = [name for name, _ in head.named_parameters(recurse=False)]
    return {"bias": None, **{name: parameter_value(head, name).to(where) for name in names}}


def continuation_nll(loaded: LoadedModel, continuations: Sequence[Continuation]) -> float:
    """Mean negative log-likelihood a token of continuations read without their prompts, nats.

    The fluency gap is this of one model's continuations minus this of the unedited model's own in the
    target language, both read by the unedited model.  NaN where there is nothing to read.
    """
    start = start_tokens(loaded.tokenizer)
    rows = [[*start, *item.ids] for item in continuations if item.ids]
    return mean_nll(loaded, row_batches(rows, uncounted=max(1, len(start))))
