"""A corpus recorded: text cut into batches that fit, read once, resumed where it was stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import find_executable_batch_size

from neurons.errors import UsageError
from neurons.files.artifact import package_versions
from neurons.models.memory import batches_for
from neurons.models.processes import is_first, world
from neurons.models.source import LoadedModel
from neurons.recording.record import record
from neurons.recording.resume import Unfinished
from neurons.recording.text_pass import Progress
from neurons.scorers.method import PACKED, TEXTS
from neurons.statistics.statistics import Statistics
from neurons.text.batches import (
    TokenBatch,
    block_length,
    language_batches,
    longest_row,
    packed_corpus,
    unknown_share,
)
from neurons.text.corpus import Corpus
from neurons.text.token_budget import budget_of, text_read

MOST_UNKNOWN = 0.2
RESPONSE_BYTES = 8 * 2**30


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
    """Read a corpus once and keep the moments.

    Args:
        loaded: the model.
        corpus: text by language.
        moments: as ``neurons.recording.record.record``.
        reads: "blocks" (joined text in full blocks) or "texts" (a text a row).
        tokens: most tokens a language; None: the corpus's, else what the moments need (``neurons.text.token_budget``).
        block: tokens a block; None takes the model's context, at most 2048, with gradients 512.  A text longer than
            the context is read in parts.
        batch_tokens: tokens read at once; None takes what the memory allows, and less after running out.
        progress: called with the number of tokens done.
        out: where the statistics will be written: an unfinished recording is kept beside it.

    Returns:
        Statistics, with ``unknown`` in the metadata: languages whose text the tokenizer does not know.

    Raises:
        UsageError: too little text in a language, a block that does not fit, or too many texts to keep
            the responses of.
        BrocaError: an activation that is not finite.
    """
    if reads == TEXTS and block is not None:
        raise UsageError("a text is read as it is, so --block means nothing to a method that reads texts")
    backward = any(moment.endswith(":attribution") for moment in moments)
    _require_room(loaded, corpus, moments)
    budget = budget_of(moments, reads)
    planned = batches_for(loaded, backward, 1)[0] if batch_tokens is None else batch_tokens

    def cut(size: int) -> dict[str, list[TokenBatch]]:
        if reads == TEXTS:
            return language_batches(loaded, corpus, tokens, size, budget.tokens)
        length = block_length(loaded.model, block, backward)
        return packed_corpus(loaded, corpus, length, tokens, size, budget.tokens)

    def attempt(size: int) -> Statistics:
        batches = cut(size)
        fitting, recomputes = batches_for(loaded, backward, longest_row(batches))
        if batch_tokens is None and size == planned and fitting != size:
            # A longer row than was planned for: activations are recomputed, in other batches.
            size, batches = fitting, cut(fitting)
        for language, some in batches.items():
            if not some:
                raise UsageError(f"language {language!r} has no text of two tokens or more")
        unfinished = None if out is None else Unfinished(out, _key(loaded, batches, moments))
        found = record(loaded, batches, moments, progress, unfinished, recomputes)
        share = {k: unknown_share(some, loaded.tokenizer) for k, some in batches.items()}
        return replace(
            found,
            metadata=_metadata(
                loaded, corpus, found, reads, block, size, share, text_read(corpus, batches), backward
            ),
        )

    if batch_tokens is not None or world()[1] > 1:
        # Processes that cut the text differently would count some of it twice: running out stops them all.
        return attempt(planned)
    halves = iter([planned // 2**i for i in range(1, 32)])
    found: Statistics = find_executable_batch_size(
        lambda batch_size: attempt(batch_size),
        starting_batch_size=planned,
        reduce_batch_size_fn=lambda: next(halves),
    )()
    return found


def finished(out: Path) -> None:
    """The output is written: what was kept of the unfinished recording may go."""
    Unfinished(out, "").remove()
    if is_first():
        for state in out.parent.glob(f".{out.name}.unfinished*"):
            state.unlink(missing_ok=True)


def _require_room(loaded: LoadedModel, corpus: Corpus, moments: Sequence[str]) -> None:
    if not any(moment.endswith(":responses") for moment in moments):
        return
    texts = sum(len(corpus.non_empty(language)) for language in corpus.languages)
    one = 4 * loaded.anatomy.layers * loaded.anatomy.neurons
    if texts * one > RESPONSE_BYTES:
        most = RESPONSE_BYTES // one // len(corpus.languages)
        raise UsageError(
            f"the responses of {texts:,} texts would take {texts * one / 1e9:.1f} GB: give at most {most:,} lines "
            "a language"
        )


def _key(loaded: LoadedModel, batches: Mapping[str, Sequence[TokenBatch]], moments: Sequence[str]) -> str:
    """Names a recording: only what has the same key may be gone on with."""
    named = {
        "fingerprint": loaded.fingerprint,
        "dtype": str(loaded.model.dtype),
        **loaded.provenance,
        "device": loaded.device.type,
        "moments": list(moments),
        "packages": package_versions(),
    }
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode())
    for language, some in batches.items():
        digest.update(language.encode())
        for batch in some:
            digest.update(str(tuple(batch.ids.shape)).encode() + batch.ids.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _metadata(
    loaded: LoadedModel,
    corpus: Corpus,
    found: Statistics,
    reads: str,
    block: int | None,
    size: int,
    unknown: Mapping[str, float],
    read: Mapping[str, Any],
    backward: bool,
) -> dict[str, Any]:
    return {
        "model": loaded.label,
        "layers": loaded.anatomy.layers,
        "neurons": loaded.anatomy.neurons,
        "experts": loaded.anatomy.experts,
        **loaded.provenance,
        "corpora": [
            {
                "digest": corpus.digest,
                "part": corpus.part,
                "tokens": dict(zip(found.languages, found.tokens.tolist(), strict=True)),
                "lines": {language: len(texts) for language, texts in corpus.texts.items()},
                "read": read,
            }
        ],
        "settings": {
            "reads": reads,
            "block": block_length(loaded.model, block, backward) if reads == PACKED else None,
            "tokens_a_batch": size,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
        },
        "unknown": {language: share for language, share in unknown.items() if share > MOST_UNKNOWN},
    }
