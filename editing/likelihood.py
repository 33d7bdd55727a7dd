"""How likely text is under a model: negative log-likelihoods (nats a token) and KL between two models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from editing.generation import Continuation
from neurons.batches import TokenBatch, row_batches
from neurons.next_token import token_divergences, token_losses
from neurons.offload import parameter_value
from neurons.recording import forward
from neurons.source import LoadedModel
from neurons.start_tokens import start_tokens

Steering = Callable[[], AbstractContextManager[None]]


def _hidden(loaded: LoadedModel, batch: TokenBatch) -> torch.Tensor:
    """[n, d]: the final hidden states from which the counted tokens that follow another are predicted."""
    on_device = batch.to(loaded.device)
    with torch.no_grad():
        return forward(loaded.model, on_device)[:, :-1][on_device.counted[:, 1:]]


def mean_nll(loaded: LoadedModel, batches: Sequence[TokenBatch]) -> float:
    """Mean negative log-likelihood of the counted tokens that follow another token, nats a token."""
    total, tokens = 0.0, 0
    for batch in batches:
        wanted = batch.ids[:, 1:][batch.counted[:, 1:]]
        total += float(token_losses(loaded.model, _hidden(loaded, batch), wanted).sum(dtype=torch.float64))
        tokens += len(wanted)
    return total / tokens if tokens else float("nan")


def hidden_states(loaded: LoadedModel, batches: Sequence[TokenBatch]) -> list[torch.Tensor]:
    """Of each batch [n, d]: the final hidden states from which the counted tokens that follow another are predicted."""
    return [_hidden(loaded, batch) for batch in batches]


def mean_kl(
    loaded: LoadedModel,
    batches: Sequence[TokenBatch],
    steering: Steering,
    unedited: Sequence[torch.Tensor] | None = None,
) -> float:
    """Mean over the counted tokens of KL(unedited || steered) of what is predicted for them, in nats.

    Only final hidden states are kept between the two passes; logits are made a few at a time.

    Args:
        loaded: the unedited model.
        batches: the text.
        steering: makes a context in which the model is steered; entered once.
        unedited: ``hidden_states`` of the unedited model, where they are known.
    """
    # A context may exchange all weights, the head's too: the unedited head is held on to.
    head = loaded.model.get_output_embeddings()
    own_head = partial(torch.nn.functional.linear, **_held(head, loaded.device))
    base = hidden_states(loaded, batches) if unedited is None else unedited
    total, positions = 0.0, 0
    with steering():
        for batch, before in zip(batches, base, strict=True):
            found = token_divergences(loaded.model, before, _hidden(loaded, batch), own_head)
            total += float(found.sum())
            positions += len(found)
    return total / positions if positions else float("nan")


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


def nll_by_language(loaded: LoadedModel, batches: Mapping[str, Sequence[TokenBatch]]) -> dict[str, float]:
    """``mean_nll`` of every language."""
    return {language: mean_nll(loaded, items) for language, items in batches.items()}
