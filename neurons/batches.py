"""Texts to token batches: packed in full blocks (to count on), or a text a row (to average over texts)."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neurons.corpus import Corpus
from neurons.embedded import require_embedded
from neurons.errors import UsageError
from neurons.source import LoadedModel
from neurons.start_tokens import start_tokens

LONGEST_BLOCK = 2048
TOKENS_A_BATCH = 4096  # on a CPU: more brings no speed
MOST_TOKENS_A_BATCH = 32768


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens for one forward pass.

    Attributes:
        ids: integers [rows, length], padded on the right; int64 once they are on a device (``to``).
        attention: bool [rows, length], False on padding.
        counted: bool [rows, length], False on padding and on the tokenizer's start tokens, which are the
            same in every language, and on what stands first where it adds none.
        lines: int64 [rows], which line of its corpus each row is; None where rows are not lines.
    """

    ids: torch.Tensor
    attention: torch.Tensor
    counted: torch.Tensor
    lines: torch.Tensor | None = None

    @property
    def line_numbers(self) -> torch.Tensor:
        """``lines``.

        Raises:
            UsageError: the rows are blocks of joined text.
        """
        if self.lines is None:
            raise UsageError("blocks of joined text are no texts of their own: read the corpus text by text")
        return self.lines

    @property
    def padded(self) -> bool:
        return not bool(self.attention.all())

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(
            self.ids.long().to(device), self.attention.to(device), self.counted.to(device), self.lines
        )


def block_length(model: Any, wanted: int | None = None) -> int:
    """Tokens a block: what was asked for, else the model's context, at most ``LONGEST_BLOCK``.

    Raises:
        UsageError: ``wanted`` is below 2 or longer than the model's context.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST_BLOCK
    if wanted is None:
        return int(min(context, LONGEST_BLOCK))
    if not 2 <= wanted <= context:
        raise UsageError(f"a block of {wanted} tokens: the model reads 2 to {context}")
    return wanted


def packed_batches(
    texts: Sequence[str],
    tokenizer: Any,
    length: int,
    language: str,
    most_tokens: int | None = None,
    tokens_a_batch: int | None = None,
) -> list[TokenBatch]:
    """Texts joined by newlines and cut into full blocks; no padding, a rest shorter than a block is left.

    Each block begins with the tokenizer's start tokens where it adds any.  The first position is not counted
    either way, as in ``text_batches``: a block begins in the middle of a text, and what stands first serves
    the model as an attention sink there too, with activations that would weigh in a mean like thousands.

    Args:
        texts: of one language.
        tokenizer: a transformers tokenizer.
        length: tokens a block, start tokens included.
        language: their name, for the error.
        most_tokens: stop after this many tokens (rounded up to whole blocks).
        tokens_a_batch: None takes ``TOKENS_A_BATCH``.

    Raises:
        UsageError: less than one block of text.
    """
    start = start_tokens(tokenizer)
    body = length - len(start)
    stream = array("i")
    wanted = None if most_tokens is None else -(-most_tokens // body) * body
    for first in range(0, len(texts), 1000):
        chunk = [text + "\n" for text in texts[first : first + 1000] if text]
        if chunk:
            for tokens in tokenizer(chunk, add_special_tokens=False)["input_ids"]:
                stream.extend(tokens)
        if wanted is not None and len(stream) >= wanted:
            break
    whole = len(stream if wanted is None else stream[:wanted]) // body
    if whole == 0:
        raise UsageError(
            f"language {language!r} has {len(stream)} tokens, less than one block of {body}: give more "
            "text or a smaller --block"
        )
    ids = torch.frombuffer(stream, dtype=torch.int32)[: whole * body].view(whole, body)
    if start:
        ids = torch.cat([torch.tensor([start], dtype=torch.int32).expand(whole, -1), ids], dim=1)
    # One row stands for all: no token takes more memory than its number.
    attention = torch.ones(1, length, dtype=torch.bool)
    counted = attention.clone()
    counted[:, : max(1, len(start))] = False
    rows = max(1, (TOKENS_A_BATCH if tokens_a_batch is None else tokens_a_batch) // length)
    return [
        TokenBatch(some, attention.expand(len(some), -1), counted.expand(len(some), -1))
        for some in ids.split(rows)
    ]


def text_batches(
    texts: Sequence[str],
    tokenizer: Any,
    length: int,
    most_tokens: int | None = None,
    tokens_a_batch: int | None = None,
) -> list[TokenBatch]:
    """One text a row, cut at ``length`` tokens, texts of like length together.

    The first position is not counted, also where the tokenizer adds no start token: what
    stands there serves the model as an attention sink, with activations unlike any other token's.  Texts
    that leave nothing to count are left out.

    The rows' order differs from the texts' order: sums over rows do not depend on it beyond rounding,
    and it is the same in every run.

    Args:
        texts: of one language; "" keeps a line's place in the count.
        most_tokens: leave out the texts after this many tokens.
        tokens_a_batch: None takes ``TOKENS_A_BATCH``.
    """
    start = start_tokens(tokenizer)
    uncounted = max(1, len(start))
    lines = [line for line, text in enumerate(texts) if text]
    rows, used = [], 0
    for first in range(0, len(lines), 1000):
        some = [texts[line] for line in lines[first : first + 1000]]
        for tokens in tokenizer(some, add_special_tokens=False)["input_ids"]:
            if most_tokens is None or used < most_tokens:
                rows.append([*start, *tokens][:length])
                used += max(0, len(rows[-1]) - uncounted)
    return row_batches(rows, uncounted, lines=lines[: len(rows)], tokens_a_batch=tokens_a_batch)


def row_batches(
    rows: Sequence[Sequence[int]],
    uncounted: int,
    lines: Sequence[int] | None = None,
    tokens_a_batch: int | None = None,
) -> list[TokenBatch]:
    """Rows of token ids, padded on the right, rows of like length together.

    Args:
        rows: token ids; rows without a counted token are left out.
        uncounted: positions at the beginning of each row that are not counted.
        lines: which line each row is; None counts the rows.
        tokens_a_batch: None takes ``TOKENS_A_BATCH``.
    """
    numbered = zip(range(len(rows)) if lines is None else lines, rows, strict=True)
    kept = sorted(
        ((line, row) for line, row in numbered if len(row) > uncounted), key=lambda item: len(item[1])
    )
    most = TOKENS_A_BATCH if tokens_a_batch is None else tokens_a_batch
    return [_padded(group, uncounted) for group in _groups(kept, most)]


def language_batches(
    loaded: LoadedModel, corpus: Corpus, tokens: int | None = None, tokens_a_batch: int | None = None
) -> dict[str, list[TokenBatch]]:
    """Each language's texts, one a row.

    Raises:
        UsageError: a text with a token that the model has no embedding of.
    """
    length = block_length(loaded.model)
    found = {
        language: text_batches(corpus.texts[language], loaded.tokenizer, length, tokens, tokens_a_batch)
        for language in corpus.languages
    }
    _require_embedded(loaded, found)
    return found


def tokens_a_batch(loaded: LoadedModel, backward: bool) -> int:
    """How many tokens to read at once: a power of two that the memory allows, the same in every run.

    By what the device holds in all, not by what is free at the moment: sums depend in their last bits on
    how the text is cut.  On a GPU 40 % of the memory is planned with; on a CPU 2 GiB.

    Args:
        loaded: the model.
        backward: whether gradients are taken; then every layer's activations and the logits are held.
    """
    anatomy, config = loaded.anatomy, loaded.model.config.get_text_config()
    size = loaded.model.dtype.itemsize
    layer = 16 * anatomy.residual + 6 * anatomy.expert_width * max(
        1, getattr(config, "num_experts_per_tok", 1) or 1
    )
    needed = size * layer * (anatomy.layers if backward else 2) + (12 * config.vocab_size if backward else 0)
    on_gpu = loaded.device.type == "cuda"
    budget = 0.4 * torch.cuda.get_device_properties(loaded.device).total_memory if on_gpu else 2 * 2**30
    most = MOST_TOKENS_A_BATCH if on_gpu else TOKENS_A_BATCH
    return int(min(most, 2 ** max(0, int(budget / needed).bit_length() - 1)))


def unknown_share(batches: Sequence[TokenBatch], tokenizer: Any) -> float:
    """Share of the counted tokens that are the tokenizer's unknown token."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    counted = sum(int(batch.counted.sum()) for batch in batches)
    if unknown is None or not counted:
        return 0.0
    return sum(int((batch.counted & (batch.ids == unknown)).sum()) for batch in batches) / counted


def packed_corpus(
    loaded: LoadedModel,
    corpus: Corpus,
    block: int | None = None,
    tokens: int | None = None,
    tokens_a_batch: int | None = None,
) -> dict[str, list[TokenBatch]]:
    """Each language's text in full blocks.

    Raises:
        UsageError: as ``packed_batches``, or a text with a token that the model has no embedding of.
    """
    length = block_length(loaded.model, block)
    found = {
        language: packed_batches(
            corpus.non_empty(language), loaded.tokenizer, length, language, tokens, tokens_a_batch
        )
        for language in corpus.languages
    }
    _require_embedded(loaded, found)
    return found


def _require_embedded(loaded: LoadedModel, found: Mapping[str, Sequence[TokenBatch]]) -> None:
    highest = max((int(batch.ids.max()) for batches in found.values() for batch in batches), default=0)
    require_embedded(loaded.name, loaded.tokenizer, highest, loaded.embedded)


def _groups(
    rows: Sequence[tuple[int, Sequence[int]]], tokens_a_batch: int
) -> Iterator[list[tuple[int, Sequence[int]]]]:
    group: list[tuple[int, Sequence[int]]] = []
    for row in rows:
        if group and (len(group) + 1) * len(row[1]) > tokens_a_batch:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _padded(rows: Sequence[tuple[int, Sequence[int]]], uncounted: int) -> TokenBatch:
    longest = max(len(row) for _, row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    attention = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, (_, row) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(list(row))
        attention[i, : len(row)] = True
    counted = attention.clone()
    counted[:, :uncounted] = False
    return TokenBatch(ids, attention, counted, torch.tensor([line for line, _ in rows]))
