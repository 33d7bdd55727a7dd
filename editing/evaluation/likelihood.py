"""Likelihood of text under a model: negative log-likelihoods (nats a token), and KL between two models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from editing.evaluation.generation import Continuation
from editing.plans.applied import applied
from editing.plans.plan import Plan
from neurons.architectures.offload import parameter_value
from neurons.models.next_token import Head, token_divergences, token_losses
from neurons.models.source import LoadedModel
from neurons.models.start_tokens import start_tokens
from neurons.recording.text_pass import Progress, forward
from neurons.text.batches import TokenBatch, fitting_batches, language_batches
from neurons.text.corpus import Corpus
from neurons.text.token_budget import LOSSES

Steering = Callable[[], AbstractContextManager[None]]


def _hidden(loaded: LoadedModel, batch: TokenBatch) -> torch.Tensor:
    """[n, d]: the final hidden states that predict the counted tokens; the first token of a row is not predicted."""
    on_device = batch.to(loaded.device)
    with torch.no_grad():
        return forward(loaded.model, on_device)[:, :-1][on_device.counted[:, 1:]]


def mean_nll(loaded: LoadedModel, batches: Sequence[TokenBatch]) -> float:
    """Mean negative log-likelihood of the counted tokens, nats a token; the first token of a row is not predicted."""
    return read_unedited(loaded, batches).nll


def _loss_sum(loaded: LoadedModel, batch: TokenBatch, hidden: torch.Tensor) -> float:
    targets = batch.ids[:, 1:][batch.counted[:, 1:]]
    return float(token_losses(loaded.model, hidden, targets).sum(dtype=torch.float64))


def language_losses(
    loaded: LoadedModel, corpus: Corpus, plans: Mapping[str, Plan], progress: Progress | None = None
) -> dict[str, dict[str, float]]:
    """Language -> the mean negative log-likelihood (nats a token) of "base" and of the model with each plan.

    Args:
        loaded: the unedited model.
        corpus: text; of each language ``LOSSES.tokens`` tokens are read.
        plans: name -> edit.
        progress: called after each pass over all languages.
    """
    batches = language_batches(loaded, corpus, default=LOSSES.tokens)
    losses: dict[str, dict[str, float]] = {language: {} for language in batches}
    for name, plan in {"base": None, **plans}.items():
        with applied(loaded, plan):
            for language, of_language in batches.items():
                losses[language][name] = mean_nll(loaded, of_language)
        if progress is not None:
            progress(1)
    return losses


@dataclass(frozen=True)
class UneditedText:
    """Some text as the unedited model reads it.

    Attributes:
        batches: the text.
        nll: nats a token; NaN without tokens.
        hidden: for each batch [n, d], the final hidden states that predict its counted tokens; None if not kept.
        head: the unedited model's output embeddings, which steering may replace; None if ``hidden`` is.
    """

    batches: Sequence[TokenBatch]
    nll: float
    hidden: tuple[torch.Tensor, ...] | None
    head: Head | None


def unedited_head(loaded: LoadedModel) -> Head:
    """The output embeddings as they are now: a copy if they are offloaded or on another GPU, so one for all texts."""
    output = loaded.model.get_output_embeddings()
    return partial(torch.nn.functional.linear, **_parameters_on(loaded.device, output))


def read_unedited(
    loaded: LoadedModel, batches: Sequence[TokenBatch], head: Head | None = None
) -> UneditedText:
    """Read text with the unedited model; with its ``head``, hidden states are kept, which KL needs."""
    total, tokens = 0.0, 0
    kept: list[torch.Tensor] = []
    for batch in batches:
        hidden = _hidden(loaded, batch)
        total += _loss_sum(loaded, batch, hidden)
        tokens += len(hidden)
        if head is not None:
            kept.append(hidden)
    nll = total / tokens if tokens else float("nan")
    return UneditedText(batches, nll, None if head is None else tuple(kept), head)


def read_again(
    loaded: LoadedModel, text: UneditedText, nll: bool = True, kl: bool = True
) -> tuple[float, float]:
    """Read the same text again with the steered model.

    Only final hidden states are kept between the two passes; logits are computed for a few positions at a time.

    Args:
        loaded: the model.
        text: with hidden states if ``kl``.
        nll: whether to compute the loss.
        kl: whether to compute the divergence.

    Returns:
        The loss, nats a token, and the mean over the counted tokens of KL(unedited || steered) of their predicted
        distributions.  NaN: not computed, or no tokens.
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
    """Mean KL on text, as in ``read_again``, between the model now and while ``steering()`` is entered."""
    before = read_unedited(loaded, batches, unedited_head(loaded))
    with steering():
        return read_again(loaded, before, nll=False)[1]


def _parameters_on(device: torch.device, module: Any) -> dict[str, Any]:
    """The weight and bias of a module on a device, also if they are offloaded."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    return {"bias": None, **{name: parameter_value(module, name).to(device) for name in names}}


def continuation_nll(loaded: LoadedModel, continuations: Sequence[Continuation]) -> float:
    """Mean negative log-likelihood of continuations read without their prompts, nats a token.

    The fluency gap is this value for one model's continuations minus that for the unedited model's continuations in
    the target language; the unedited model reads both.  NaN without tokens.
    """
    start = start_tokens(loaded.tokenizer)
    rows = [[*start, *item.ids] for item in continuations if item.ids]
    return mean_nll(loaded, fitting_batches(loaded, rows, max(1, len(start))))
