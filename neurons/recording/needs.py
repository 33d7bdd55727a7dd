"""Memory needs of the stages that read text, computed from sizes alone (``neurons.models.memory``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from neurons.models.memory import (
    LIBRARIES,
    MAX_TOKENS,
    Need,
    backward_bytes,
    batches_for,
    forward_bytes,
    logit_bytes,
    read_weights,
    sizes_of,
)
from neurons.models.source import LoadedModel
from neurons.scorers.method import PACKED
from neurons.text.batches import TokenBatch, block_length, counted_tokens, language_batches, longest_row
from neurons.text.corpus import Corpus


@dataclass(frozen=True)
class Text:
    """The size of the text to read.

    Attributes:
        row: tokens of the longest row.
        tokens: tokens of all languages.
        texts: rows of all languages.
        batch: positions of the largest batch of texts.
        packs: whether texts can be joined into blocks.
    """

    languages: int
    row: int
    tokens: int
    texts: int
    batch: int = MAX_TOKENS
    packs: bool = True


def text_of(
    planned: LoadedModel,
    corpus: Corpus,
    tokens: int | None = None,
    default: int | None = None,
    batch_tokens: int | None = None,
) -> Text:
    """The size of a corpus in tokens of this model; full rows if the model has no tokenizer.

    Args:
        tokens: as in ``neurons.text.batches.language_batches``.
        default: as there.
        batch_tokens: tokens in a batch; None: as many as are fast.
    """
    length, size = block_length(planned.model), MAX_TOKENS if batch_tokens is None else batch_tokens
    if planned.tokenizer is None:
        count = MAX_TOKENS if tokens is None else tokens
        return Text(len(corpus.languages), length, count * len(corpus.languages), count // length + 1, size)
    batches = language_batches(planned, corpus, tokens, size, default)
    return text_of_batches(batches, not corpus.has_conversations)


def text_of_batches(batches: Mapping[str, Sequence[TokenBatch]], packs: bool = False) -> Text:
    """The size of text that is cut into batches."""
    flat = [batch for of_language in batches.values() for batch in of_language]
    return Text(
        len(batches),
        longest_row(batches),
        counted_tokens(flat),
        sum(len(batch.ids) for batch in flat),
        max((batch.ids.numel() for batch in flat), default=1),
        packs,
    )


def _read_at_once(
    planned: LoadedModel, backward: bool, row: int, batch: int | None, batch_tokens: int | None
) -> tuple[int, bool]:
    """Tokens of the largest batch, and whether activations are recomputed; arguments as in ``pass_need``."""
    tokens, recomputes = batches_for(planned, backward, row)
    tokens = tokens if batch_tokens is None else max(row, batch_tokens)
    return tokens if batch is None else min(tokens, batch), recomputes


def pass_need(
    planned: LoadedModel,
    stage: str,
    row: int,
    backward: bool,
    batch: int | None = None,
    batch_tokens: int | None = None,
    **more: int,
) -> Need:
    """The need of a pass over text in batches that fit, or of a given size.

    Args:
        row: tokens of the longest row.
        backward: whether gradients are computed.
        batch: positions of the largest batch; None: batches are full.
        batch_tokens: tokens in a batch; None: as many as fit.
        more: further parts -> bytes.

    Raises:
        BrocaError: the weights, or a single row, do not fit.
    """
    sizes = sizes_of(planned)
    tokens, recomputes = _read_at_once(planned, backward, row, batch, batch_tokens)
    activations = backward_bytes(sizes, tokens, recomputes) if backward else forward_bytes(sizes, tokens)
    logits = {"logits": logit_bytes(sizes, tokens, True)} if backward else {}
    weights = read_weights(planned, backward or "logits" in more)
    parts = {"libraries": LIBRARIES, "weights": weights, "activations": activations, **logits, **more}
    return Need(stage, parts, tokens, recomputes)


def recording_need(
    planned: LoadedModel,
    text: Text,
    moments: Sequence[str],
    reads: str,
    block: int | None = None,
    batch_tokens: int | None = None,
) -> Need:
    """The need of ``neurons.recording.corpus_recording.record_corpus`` with the same arguments."""
    sizes = sizes_of(planned)
    backward = any(moment.endswith(":attribution") for moment in moments)
    kept = any(moment.endswith(":responses") for moment in moments)
    sums = 8 * sizes.layers * sizes.neurons * text.languages * len(moments)
    responses = 4 * sizes.layers * sizes.neurons * text.texts if kept else 0
    if reads == PACKED and text.packs:
        row, batch = block_length(planned.model, block, backward), None
    else:
        row, batch = text.row, text.batch
    return pass_need(planned, "record", row, backward, batch, batch_tokens, sums=sums + responses)


def ablation_need(planned: LoadedModel, text: Text, batch_tokens: int | None = None) -> Need:
    """The need of ``neurons.ablation.conditions.condition_losses``, which keeps every layer's input of a batch."""
    sizes = sizes_of(planned)
    tokens, _ = _read_at_once(planned, False, text.row, text.batch, batch_tokens)
    kept = sizes.value * sizes.residual * sizes.layers * tokens
    logits = logit_bytes(sizes, tokens, False)
    return pass_need(planned, "ablate", text.row, False, text.batch, batch_tokens, kept=kept, logits=logits)
