"""Token batches: text packed into full blocks (for counts), or one text in each row (for means over texts)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from neurons.errors import UsageError
from neurons.models.embedded import require_embedded
from neurons.models.memory import MAX_TOKENS, batches_for, common_batches
from neurons.models.source import LoadedModel
from neurons.models.start_tokens import start_tokens
from neurons.text.conversations import MESSAGE_ROLES
from neurons.text.corpus import Corpus
from neurons.text.corpus_rows import Conversation, Text
from neurons.text.sampling import even_order
from neurons.text.token_rows import TokenRow, conversation_row

MAX_BLOCK = 2048
MAX_BLOCK_BACKWARD = 512  # activations for gradients grow with the block: 2,048 tokens of a 0.5B take 4 GB
TOKENS_A_BATCH = MAX_TOKENS
LINES_AT_ONCE = 1000  # in one call of the tokenizer
MAX_PADDING = 128  # positions in a batch: more cost more time than another batch
# On CPUs, oneDNN compiles bfloat16 products anew for every number of positions and keeps the code: .6 MB a product
# and number.  Sizes are multiples of a power of two, 1/32 to 1/64 of the maximum, so that text of any length has few.
# Batches of less than an eighth of the maximum are rare in long text, and keep their size.
SIZES, FEW_POSITIONS = 32, 8


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens for one forward pass.

    Attributes:
        ids: integers [rows, length], padded on the right; int64 on a device (``to``).
        attention: bool [rows, length], False on padding.
        counted: bool [rows, length], False on padding, on the tokenizer's start tokens, which are the same in every
            language, on the first position if there is no start token, and on a conversation's tokens of other roles.
        lines: int64 [rows], the line of the corpus in each row; None for packed text.
        fractions: float64 [rows], the fraction of its line's counted tokens in each row; None if rows are whole lines.
        groups: int64 [rows, length], the group of each counted token; None: all belong to the batch's language.
        starts: number of positions at the beginning of each row that hold the start tokens.
    """

    ids: torch.Tensor
    attention: torch.Tensor
    counted: torch.Tensor
    lines: torch.Tensor | None = None
    fractions: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    starts: int = 1

    @property
    def at_start(self) -> torch.Tensor:
        """bool [rows, length], the start tokens."""
        return self.attention & (torch.arange(self.ids.shape[1], device=self.ids.device) < self.starts)

    @property
    def line_numbers(self) -> torch.Tensor:
        """``lines``.

        Raises:
            UsageError: the rows are blocks of packed text.
        """
        if self.lines is None:
            raise UsageError("packed text has no rows for single texts: read the corpus text by text")
        return self.lines

    @property
    def padded(self) -> bool:
        return not bool(self.attention.all())

    def to(self, device: torch.device) -> TokenBatch:
        groups = None if self.groups is None else self.groups.to(device)
        ids, attention = self.ids.long().to(device), self.attention.to(device)
        return replace(self, ids=ids, attention=attention, counted=self.counted.to(device), groups=groups)


def context_length(model: Any) -> int | None:
    """Maximum number of tokens that a model reads at once; None if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def block_length(model: Any, length: int | None = None, backward: bool = False) -> int:
    """Tokens in a block: ``length``, by default the model's context up to ``MAX_BLOCK``.

    With ``backward`` the default is at most ``MAX_BLOCK_BACKWARD``.

    Raises:
        UsageError: ``length`` is below 2 or longer than the model's context.
    """
    context = context_length(model) or MAX_BLOCK
    if length is None:
        return int(min(context, MAX_BLOCK_BACKWARD if backward else MAX_BLOCK))
    if not 2 <= length <= context:
        raise UsageError(f"a block of {length} tokens: the model reads 2 to {context}")
    return length


def packed_batches(
    texts: Sequence[Text],
    tokenizer: Any,
    length: int,
    language: str,
    max_tokens: int | None = None,
    tokens_a_batch: int | None = None,
) -> list[TokenBatch]:
    """Texts joined by newlines and cut into full blocks; an incomplete last block is dropped.

    Each block begins with the tokenizer's start tokens, if it adds any.  The first position is never counted,
    as in ``text_batches``: the model uses it as an attention sink, with activations that would dominate a mean.

    Args:
        tokenizer: a transformers tokenizer.
        length: tokens in a block, including start tokens.
        language: the language, for the error.
        max_tokens: tokens to read (rounded up to whole blocks), evenly from the whole text; None reads all.
        tokens_a_batch: None takes ``TOKENS_A_BATCH``.

    Raises:
        UsageError: less than one block of text.
    """
    start = start_tokens(tokenizer)
    body = length - len(start)
    blocks = None if max_tokens is None else -(-max_tokens // body)
    stream = array("i")
    for row in _sampled(texts, tokenizer, None if blocks is None else blocks * body, "\n").values():
        stream.extend(row.ids)
    whole = len(stream) // body
    if whole == 0:
        raise UsageError(
            f"language {language!r} has {len(stream)} tokens, less than one block of {body}: give more "
            "text or a smaller --block"
        )
    ids = torch.frombuffer(stream, dtype=torch.int32)[: whole * body].view(whole, body)
    if blocks is not None and whole > blocks:
        ids = ids[sorted(even_order(whole)[:blocks])]
        whole = blocks
    if start:
        ids = torch.cat([torch.tensor([start], dtype=torch.int32).expand(whole, -1), ids], dim=1)
    # Masks of one row, expanded, so that a token takes no more memory than its id.
    attention = torch.ones(1, length, dtype=torch.bool)
    counted = attention.clone()
    uncounted = max(1, len(start))
    counted[:, :uncounted] = False
    rows = max(1, (TOKENS_A_BATCH if tokens_a_batch is None else tokens_a_batch) // length)
    return [
        TokenBatch(chunk, attention.expand(len(chunk), -1), counted.expand(len(chunk), -1), starts=uncounted)
        for chunk in ids.split(rows)
    ]


def text_batches(
    texts: Sequence[Text],
    tokenizer: Any,
    length: int,
    max_tokens: int | None = None,
    tokens_a_batch: int | None = None,
    roles: Sequence[str] = MESSAGE_ROLES,
    context: int | None = None,
) -> list[TokenBatch]:
    """One text in each row, grouped by length; a text of more than ``length`` tokens has several rows.

    A conversation is always one row, because its template stands only at its beginning.

    The first position is never counted, even without a start token: the model uses it as an attention sink,
    with activations unlike those of other tokens.  Texts without counted tokens are dropped.

    The rows are not in the order of the texts.  Their order is the same in every run, and sums over rows depend
    on it only by rounding.

    Args:
        texts: texts of one language; "" keeps its line number.
        tokenizer: a transformers tokenizer.
        length: maximum tokens in a row, including start tokens.
        max_tokens: tokens to read (rounded up to whole rows), evenly from the whole text; None reads all.
        tokens_a_batch: None takes ``TOKENS_A_BATCH``.
        roles: roles of the counted tokens of conversations.
        context: maximum tokens of a conversation; None: ``length``.

    Raises:
        UsageError: a conversation that is too long, or that the tokenizer's template does not render.
    """
    start = start_tokens(tokenizer)
    uncounted, body = max(1, len(start)), length - len(start)
    rows: list[TokenRow] = []
    used = 0
    for line, row in _sampled(texts, tokenizer, max_tokens, "", roles, context or length).items():
        if isinstance(texts[line], Conversation):
            pieces = [row]
        else:
            ids = [[*start, *row.ids[first : first + body]] for first in range(0, len(row.ids), body)]
            pieces = [TokenRow(line, piece, range(uncounted, len(piece))) for piece in ids]
        sampled = []
        for place in even_order(len(pieces)):
            if max_tokens is None or used < max_tokens:
                sampled.append(place)
                used += len(pieces[place].counted)
        rows += [pieces[place] for place in sorted(sampled)]
    return token_row_batches(rows, uncounted, tokens_a_batch)


def row_batches(
    rows: Sequence[Sequence[int]],
    uncounted: int,
    tokens_a_batch: int | None = None,
    lines: Sequence[int] | None = None,
) -> list[TokenBatch]:
    """Rows of token ids, padded on the right and grouped by length.

    A batch ends when it is full, or when the next row would add more than ``MAX_PADDING`` positions of padding.
    Rows and length are chosen so that batches have few different numbers of positions (``SIZES``).

    Args:
        rows: token ids; rows without a counted token are dropped.
        uncounted: positions at the beginning of each row that are not counted.
        tokens_a_batch: None takes ``TOKENS_A_BATCH``.
        lines: the line of each row; None numbers the rows.
    """
    numbered = zip(range(len(rows)) if lines is None else lines, rows, strict=True)
    counted = [TokenRow(line, row, range(uncounted, len(row))) for line, row in numbered]
    return token_row_batches(counted, uncounted, tokens_a_batch)


def token_row_batches(
    rows: Sequence[TokenRow], starts: int, tokens_a_batch: int | None = None
) -> list[TokenBatch]:
    """As ``row_batches``, of rows with their counted positions and lines, after ``starts`` start tokens."""
    kept = sorted((row for row in rows if len(row.counted)), key=lambda row: len(row.ids))
    max_positions = TOKENS_A_BATCH if tokens_a_batch is None else tokens_a_batch
    of_line: dict[int, int] = {}
    for row in kept:
        of_line[row.line] = of_line.get(row.line, 0) + len(row.counted)
    split = len(of_line) < len(kept)
    longest = len(kept[-1].ids) if kept else 0
    return [
        padded_batch(group, min(length, longest), starts, of_line if split else None)
        for group, length in _groups(kept, max_positions)
    ]


def fitting_batches(loaded: LoadedModel, rows: Sequence[Sequence[int]], uncounted: int) -> list[TokenBatch]:
    """``row_batches`` of at most ``TOKENS_A_BATCH`` tokens that memory allows for a pass without gradients.

    Raises:
        BrocaError: a row does not fit.
    """
    longest = max(map(len, rows), default=1)
    return row_batches(rows, uncounted, min(TOKENS_A_BATCH, batches_for(loaded, False, longest)[0]))


def language_batches(
    loaded: LoadedModel,
    corpus: Corpus,
    tokens: int | None = None,
    tokens_a_batch: int | None = None,
    default: int | None = None,
) -> dict[str, list[TokenBatch]]:
    """Each language's texts, one text in each row.

    Of conversations, tokens of ``corpus.roles`` are counted, of other texts all but the start tokens.

    Args:
        tokens: maximum tokens of a language, evenly from the whole text; None: ``corpus.tokens``, else the default.
        tokens_a_batch: None takes what memory allows for a pass without gradients.
        default: maximum if neither is given; None reads all.

    Raises:
        UsageError: the model has no embedding for a token; a conversation is longer than the model's context, or its
            chat template does not render it; or a language has conversations without a token of the roles.
        BrocaError: a row does not fit.
    """
    length, max_tokens = block_length(loaded.model), _max_tokens(corpus, tokens, default)
    context = context_length(loaded.model) or length
    at_once = (
        min(TOKENS_A_BATCH, batches_for(loaded, False, 1)[0]) if tokens_a_batch is None else tokens_a_batch
    )
    batches = {
        language: text_batches(
            corpus.texts[language], loaded.tokenizer, length, max_tokens, at_once, corpus.roles, context
        )
        for language in corpus.languages
    }
    for language, of_language in batches.items():
        if not of_language and corpus.has_conversations:
            raise UsageError(
                f"the conversations in {language!r} have no token of the roles {', '.join(corpus.roles)}: choose others"
            )
    batches_for(loaded, False, longest_row(batches))
    require_embedded_tokens(loaded, batches)
    return batches


def common_tokens(loaded: LoadedModel) -> int:
    """The ``tokens_a_batch`` of ``language_batches`` by default, the same in all processes, which must all call it."""
    return min(TOKENS_A_BATCH, common_batches(loaded, False, 1)[0])


def longest_row(batches: Mapping[str, Sequence[TokenBatch]]) -> int:
    """Tokens of the longest row; 1 without rows."""
    return max((batch.ids.shape[1] for of_language in batches.values() for batch in of_language), default=1)


def counted_tokens(batches: Iterable[TokenBatch]) -> int:
    """Number of counted tokens."""
    return sum(int(batch.counted.sum()) for batch in batches)


def unknown_rate(batches: Sequence[TokenBatch], tokenizer: Any) -> float:
    """Fraction of the counted tokens that are the tokenizer's unknown token."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    counted = counted_tokens(batches)
    if unknown is None or not counted:
        return 0.0
    return sum(int((batch.counted & (batch.ids == unknown)).sum()) for batch in batches) / counted


def packed_corpus(
    loaded: LoadedModel,
    corpus: Corpus,
    block: int | None = None,
    tokens: int | None = None,
    tokens_a_batch: int | None = None,
    default: int | None = None,
) -> dict[str, list[TokenBatch]]:
    """Each language's text in full blocks; ``tokens`` and ``default`` as in ``language_batches``.

    A corpus with conversations is read as by ``language_batches``: joined with others, a conversation would be read
    after messages that do not belong to it.

    Raises:
        UsageError: as ``packed_batches`` or ``language_batches``, or the model has no embedding for a token.
    """
    if corpus.has_conversations:
        return language_batches(loaded, corpus, tokens, tokens_a_batch, default)
    length, max_tokens = block_length(loaded.model, block), _max_tokens(corpus, tokens, default)
    batches = {
        language: packed_batches(
            corpus.non_empty(language), loaded.tokenizer, length, language, max_tokens, tokens_a_batch
        )
        for language in corpus.languages
    }
    require_embedded_tokens(loaded, batches)
    return batches


def require_embedded_tokens(loaded: LoadedModel, batches: Mapping[str, Sequence[TokenBatch]]) -> None:
    """Check that the model has an embedding for every token.

    Raises:
        UsageError: it has none for some token.
    """
    highest = max(
        (int(batch.ids.max()) for of_language in batches.values() for batch in of_language), default=0
    )
    require_embedded(loaded.name, loaded.tokenizer, highest, loaded.embedding_rows)


def _groups(rows: Sequence[TokenRow], max_positions: int) -> Iterator[tuple[Sequence[TokenRow], int]]:
    """The rows of each batch and its length, from rows sorted by length."""
    unit = _power_of_two(max_positions // SIZES)
    first = 0
    while first < len(rows):
        number = _rows_at_once(rows, first, max_positions)
        multiple = 1
        if number * len(rows[first + number - 1].ids) * FEW_POSITIONS >= max_positions:
            step = min(unit, _power_of_two(number))
            number -= number % step
            multiple = unit // step
        group = rows[first : first + number]
        yield group, -(-len(group[-1].ids) // multiple) * multiple
        first += number


def _rows_at_once(rows: Sequence[TokenRow], first: int, max_positions: int) -> int:
    tokens = 0
    for place in range(first, len(rows)):
        number, length = place - first, len(rows[place].ids)
        size = (number + 1) * length
        if number and (size > max_positions or size - tokens - length > MAX_PADDING):
            return number
        tokens += length
    return len(rows) - first


def _power_of_two(most: int) -> int:
    return 1 << max(0, most.bit_length() - 1)


def _max_tokens(corpus: Corpus, tokens: int | None, default: int | None) -> int | None:
    return next((number for number in (tokens, corpus.tokens) if number is not None), default)


def _sampled(
    texts: Sequence[Text],
    tokenizer: Any,
    max_tokens: int | None,
    ending: str = "",
    roles: Sequence[str] = MESSAGE_ROLES,
    context: int = MAX_BLOCK,
) -> dict[int, TokenRow]:
    """Line -> its tokens, in file order: all lines, or evenly sampled lines with ``max_tokens`` tokens in total.

    Texts have no start tokens; conversations have those of their template.
    """
    lines = [line for line, text in enumerate(texts) if text]
    order = lines if max_tokens is None else [line for line in even_order(len(texts)) if texts[line]]
    of_line: dict[int, TokenRow] = {}
    used = 0
    for first in range(0, len(order), LINES_AT_ONCE):
        chunk = order[first : first + LINES_AT_ONCE]
        plain = [text + ending for line in chunk if isinstance(text := texts[line], str)]
        ids = iter(tokenizer(plain, add_special_tokens=False)["input_ids"] if plain else ())
        for line in chunk:
            text = texts[line]
            of_text = next(ids) if isinstance(text, str) else ()
            if max_tokens is not None and used >= max_tokens:
                continue
            if isinstance(text, str):
                row = TokenRow(line, of_text, range(len(of_text)))
            else:
                row = conversation_row(line, text, tokenizer, roles, context)
            of_line[line] = row
            used += len(row.counted)
        if max_tokens is not None and used >= max_tokens:
            break
    return dict(sorted(of_line.items()))


def padded_batch(
    rows: Sequence[TokenRow], length: int, starts: int, of_line: Mapping[int, int] | None = None
) -> TokenBatch:
    """A batch of rows in their order.

    Args:
        rows: of at most ``length`` tokens.
        length: positions of each row, padding on the right included.
        starts: number of start tokens of each row.
        of_line: line -> its counted tokens, if it has several rows; None: every row is a whole line.
    """
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    attention = torch.zeros(len(rows), length, dtype=torch.bool)
    counted = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(list(row.ids))
        attention[i, : len(row.ids)] = True
        counted[i, list(row.counted)] = True
    lines = torch.tensor([row.line for row in rows])
    fractions = (
        None
        if of_line is None
        else torch.tensor([len(row.counted) / of_line[row.line] for row in rows], dtype=torch.float64)
    )
    return TokenBatch(ids, attention, counted, lines, fractions, starts=starts)
