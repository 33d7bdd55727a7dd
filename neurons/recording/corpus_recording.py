"""Recording of a corpus: batches that fit into memory, read once, with resuming."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

from accelerate.utils import find_executable_batch_size

from neurons.architectures.anatomy import ROUTER_OUT
from neurons.errors import UsageError
from neurons.files.artifact import package_versions
from neurons.models.memory import common_batches
from neurons.models.processes import is_first, world
from neurons.models.source import LoadedModel
from neurons.recording.record import record
from neurons.recording.resume import Unfinished
from neurons.recording.text_pass import Progress, begin_stage, line_numbers
from neurons.scorers.method import PACKED, TEXTS
from neurons.statistics.routing import ROUTING
from neurons.statistics.statistics import Statistics
from neurons.text.batches import (
    TokenBatch,
    block_length,
    language_batches,
    longest_row,
    packed_corpus,
    unknown_rate,
)
from neurons.text.corpus import Corpus
from neurons.text.token_budget import budget_of, text_read

MAX_UNKNOWN = 0.2
MAX_RESPONSE_BYTES = 8 * 2**30


def record_corpus(
    loaded: LoadedModel,
    corpus: Corpus,
    moments: Sequence[str],
    reads: str = PACKED,
    tokens: int | None = None,
    block: int | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
    out: Path | None = None,
) -> Statistics:
    """Record moments of a corpus in one pass; of a mixture of experts also ``ROUTING``.

    Args:
        loaded: the model.
        corpus: text by language.
        moments: as ``neurons.recording.record.record``.
        reads: "blocks" (text packed into full blocks) or "texts" (one text in each row).  A corpus with conversations
            is always read by texts.
        tokens: maximum tokens of a language; None: ``corpus.tokens``, else what the moments need
            (``neurons.text.token_budget``).
        block: tokens in a block; None takes the model's context, at most 2048, with gradients 512.
        batch_tokens: tokens in a batch; None takes what memory allows, and halves it after running out of memory.
        progress: called with the number of tokens of each batch that is done.
        out: output file of the statistics; the state of an unfinished recording is kept beside it.

    Returns:
        Statistics, with ``unknown`` in the metadata: languages with a rate of unknown tokens above
        ``MAX_UNKNOWN``, and the rate.

    Raises:
        UsageError: too little text in a language, a block longer than the context, or too many texts to keep
            their responses.
        BrocaError: an activation that is not finite.
    """
    packs = reads == PACKED and not corpus.has_conversations
    if not packs and block is not None:
        what = (
            "a method that reads texts"
            if reads == TEXTS
            else "conversations, which are not joined into blocks"
        )
        raise UsageError(f"--block is not supported by {what}: leave it out")
    backward = any(moment.endswith(":attribution") for moment in moments)
    budget = budget_of(moments, reads)
    if loaded.anatomy.width(ROUTER_OUT):
        moments = [*moments, *(moment for moment in [ROUTING] if moment not in moments)]
    planned = common_batches(loaded, backward, 1)[0] if batch_tokens is None else batch_tokens

    def cut(size: int) -> dict[str, list[TokenBatch]]:
        if not packs:
            return language_batches(loaded, corpus, tokens, size, budget.tokens)
        length = block_length(loaded.model, block, backward)
        return packed_corpus(loaded, corpus, length, tokens, size, budget.tokens)

    def attempt(size: int) -> Statistics:
        batches = cut(size)
        fitting, recomputes = common_batches(loaded, backward, longest_row(batches))
        if batch_tokens is None and size == planned and fitting != size:
            # A row is longer than planned: activations are recomputed, in other batches.
            size, batches = fitting, cut(fitting)
        for language, of_language in batches.items():
            if not of_language:
                raise UsageError(f"language {language!r} has no text of two tokens or more")
        _require_room(loaded, batches, moments)
        key = recording_key(loaded, batches, moments)
        unfinished = None if out is None else Unfinished(out, key, size)
        statistics = record(loaded, batches, moments, progress, unfinished, recomputes)
        unknown = {k: unknown_rate(of_language, loaded.tokenizer) for k, of_language in batches.items()}
        read = text_read(corpus, batches)
        return replace(
            statistics,
            metadata=recording_metadata(
                loaded, corpus, statistics, PACKED if packs else TEXTS, block, size, unknown, read, backward
            ),
        )

    if batch_tokens is not None or world()[1] > 1:
        # No retry in several processes: with batches of different sizes they would count text twice.
        return attempt(planned)
    first = planned
    kept = {} if out is None else Unfinished(out, "").kept()
    size = kept.get("size")
    if isinstance(size, int) and size != planned and kept["key"] == recording_key(loaded, cut(size), moments):
        # The unfinished recording had run out of memory with larger batches.
        first = size
    halves = iter([first >> i for i in range(1, 32)])

    def halved() -> int:
        begin_stage(progress, "Recording activations in smaller batches", 0, "tokens")
        return next(halves)

    statistics: Statistics = find_executable_batch_size(
        lambda batch_size: attempt(batch_size),
        starting_batch_size=first,
        reduce_batch_size_fn=halved,
    )()
    return statistics


def model_metadata(loaded: LoadedModel) -> dict[str, Any]:
    """The name and the sizes of the model.

    ``neuron_counts``, ``heads`` and ``head_widths`` are of each layer; ``without_heads``: kind of attention -> its layers.
    """
    anatomy = loaded.anatomy
    counts = anatomy.unit_counts("head")
    without: dict[str, list[int]] = {}
    for layer in (layer for layer, count in enumerate(counts) if not count):
        without.setdefault(anatomy.attention[layer], []).append(layer)
    return {
        "model": loaded.label,
        "layers": anatomy.layers,
        "neurons": anatomy.neurons,
        "experts": anatomy.experts,
        "neuron_counts": list(anatomy.unit_counts("neuron")),
        "heads": list(counts),
        "head_widths": list(anatomy.head_dims),
        "without_heads": without,
        **loaded.provenance,
    }


def remove_unfinished(out: Path) -> None:
    """Remove the states of unfinished recordings beside an output that is written."""
    Unfinished(out, "").remove()
    if is_first():
        # With two dots: a state that was killed while it was written.
        for dots in (".", ".."):
            for state in out.parent.glob(f"{dots}{escape(out.name)}.unfinished*"):
                state.unlink(missing_ok=True)


def _require_room(
    loaded: LoadedModel, batches: Mapping[str, Sequence[TokenBatch]], moments: Sequence[str]
) -> None:
    if not any(moment.endswith(":responses") for moment in moments):
        return
    texts = sum(map(len, line_numbers(batches).values()))
    text_bytes = 4 * loaded.anatomy.layers * loaded.anatomy.neurons
    if texts * text_bytes > MAX_RESPONSE_BYTES:
        raise UsageError(
            f"the responses to {texts:,} texts would take {texts * text_bytes / 1e9:.1f} GB: read fewer tokens (--tokens), "
            f"at most {MAX_RESPONSE_BYTES // text_bytes // len(batches):,} texts of each language"
        )


def recording_key(
    loaded: LoadedModel, batches: Mapping[str, Sequence[TokenBatch]], moments: Sequence[str]
) -> str:
    """The identity of a recording: a state is resumed only by a recording with the same key.

    Args:
        moments: what is recorded, with all its settings.
    """
    named = {
        "fingerprint": loaded.fingerprint,
        "dtype": str(loaded.model.dtype),
        **loaded.provenance,
        "device": loaded.device.type,
        "moments": list(moments),
        "packages": package_versions(),
    }
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode())
    for language, of_language in batches.items():
        digest.update(language.encode())
        for batch in of_language:
            digest.update(str(tuple(batch.ids.shape)).encode() + batch.ids.contiguous().numpy().tobytes())
            for tensor in (batch.counted, batch.lines, batch.fractions):
                if tensor is not None:
                    digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def recording_metadata(
    loaded: LoadedModel,
    corpus: Corpus,
    statistics: Statistics,
    reads: str,
    block: int | None,
    size: int,
    unknown: Mapping[str, float],
    read: Mapping[str, Any],
    backward: bool,
) -> dict[str, Any]:
    """The metadata of statistics of a corpus.

    Args:
        reads: "blocks" or "texts".
        block: tokens in a block, as given.
        size: tokens in a batch.
        unknown: language -> rate of unknown tokens.
        read: of ``text_read``.
        backward: whether gradients were computed.
    """
    return {
        **model_metadata(loaded),
        "corpora": [
            {
                **corpus.provenance,
                "tokens": dict(zip(statistics.languages, statistics.tokens.tolist(), strict=True)),
                "lines": {language: len(texts) for language, texts in corpus.texts.items()},
                "digests": {k: digest for k, digest in corpus.digests.items() if k in statistics.languages},
                "read": read,
            }
        ],
        "settings": {
            "reads": reads,
            "block": block_length(loaded.model, block, backward) if reads == PACKED else None,
            "tokens_a_batch": size,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
        },
        "unknown": {language: rate for language, rate in unknown.items() if rate > MAX_UNKNOWN},
    }
