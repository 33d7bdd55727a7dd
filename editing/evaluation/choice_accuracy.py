"""Whether a model prefers the right one of four answers to a question (the cloze formulation of arXiv 2406.08446).

The user message is the question alone, rendered by the model's chat template up to the start of the answer, without thoughts.  Scored is
each choice as the answer that follows: the sum of the log-probabilities of its tokens, in float64, without an end token
and not divided by the length.  The choices are not in the prompt and have no letters, since small models nearly always
answer "A".

An item is right if its answer's sum is greater than that of each other choice: a tie is wrong.

The four choices of an item share one pass over the prompt: its keys and values are kept and repeated.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from editing.evaluation.asking import chat_tokens
from editing.evaluation.choices import LETTERS
from editing.evaluation.generation import prompt_rows, writing_bytes
from neurons.architectures.sites import body
from neurons.errors import UsageError
from neurons.models.memory import MAX_TOKENS, batches_for, max_room, sizes_of
from neurons.models.next_token import token_losses
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Progress
from neurons.text.batches import TokenBatch, context_length, row_batches
from neurons.text.conversations import ANOTHER_MODEL


def choice_log_probabilities(
    loaded: LoadedModel,
    questions: Sequence[str],
    choices: Sequence[Sequence[str]],
    progress: Progress | None = None,
) -> torch.Tensor:
    """float64 [n, 4]: log-probability of each choice as the beginning of the answer, nats.

    Args:
        loaded: the model as it now computes, with a chat template.
        questions: user messages; at least one.
        choices: four to each question.
        progress: called with the number of questions of each batch.

    Raises:
        UsageError: a template that fails or drops the question, or an item longer than the model's context.
    """
    prompts = [chat_tokens(loaded.tokenizer, text, ANOTHER_MODEL, thinks=False) for text in questions]
    rows = prompt_rows(loaded.name, loaded.tokenizer, prompts, loaded.embedding_rows)
    texts = [choice for of_item in choices for choice in of_item]
    continuations = prompt_rows(
        loaded.name,
        loaded.tokenizer,
        loaded.tokenizer(texts, add_special_tokens=False)["input_ids"],
        loaded.embedding_rows,
    )
    longest, context = max(map(len, rows)) + max(map(len, continuations)), context_length(loaded.model)
    if context is not None and longest > context:
        raise UsageError(f"an item has {longest} tokens, but the model reads {context}: shorten it")
    at_once, sizes = min(MAX_TOKENS, batches_for(loaded, False, longest)[0]), sizes_of(loaded)
    while at_once > longest and writing_bytes(sizes, at_once // longest, longest, 0) > max_room(loaded):
        at_once //= 2
    # A prompt's keys and values are there once for each choice.
    at_once //= len(LETTERS)
    result = torch.empty(len(rows), len(LETTERS), dtype=torch.float64)
    for batch in row_batches(rows, 0, tokens_a_batch=at_once):
        lines = batch.line_numbers.tolist()
        of_batch = [
            continuations[len(LETTERS) * line + place] for line in lines for place in range(len(LETTERS))
        ]
        result[lines] = _sums(loaded, batch, of_batch).view(-1, len(LETTERS))
        if progress is not None:
            progress(len(lines))
    return result


def right(log_probabilities: torch.Tensor, answers: Sequence[int]) -> list[bool]:
    """Whether the answer has a greater log-probability than each other choice.

    Args:
        log_probabilities: [n, 4].
        answers: index of the right choice of each item.
    """
    rows = torch.arange(len(answers))
    others = log_probabilities.clone()
    others[rows, list(answers)] = -torch.inf
    hits: list[bool] = (log_probabilities[rows, list(answers)] > others.amax(1)).tolist()
    return hits


def _sums(loaded: LoadedModel, batch: TokenBatch, continuations: Sequence[Sequence[int]]) -> torch.Tensor:
    """float64 [rows * 4]: log-probabilities of four continuations to each prompt of the batch."""
    device, base, times = loaded.device, body(loaded.model), len(LETTERS)
    ids = torch.zeros(len(continuations), max(map(len, continuations)), dtype=torch.int64)
    there = torch.zeros_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(continuations):
        ids[row, : len(tokens)] = torch.tensor(list(tokens))
        there[row, : len(tokens)] = True
    ids, there = ids.to(device), there.to(device)
    # As in generation, padding is on the left: behind it the cache of a sliding window would hold padding.
    padding = (~batch.attention).sum(1).tolist()
    prompts = _shifted(batch.ids.long(), padding).to(device)
    mask = _shifted(batch.attention.long(), padding).to(device)
    has_positions = "position_ids" in inspect.signature(base.forward).parameters

    def hidden_states(tokens: torch.Tensor, mask: torch.Tensor, **cache: Any) -> Any:
        if has_positions:
            cache["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        return base(input_ids=tokens, attention_mask=mask, use_cache=True, **cache)

    with torch.no_grad():
        read = hidden_states(prompts, mask)
        hidden = read.last_hidden_state[:, -1:].to(device).repeat_interleave(times, 0)
        if ids.shape[1] > 1:
            read.past_key_values.batch_repeat_interleave(times)
            mask = torch.cat([mask.repeat_interleave(times, 0), torch.ones_like(ids[:, :-1])], 1)
            states = hidden_states(ids[:, :-1], mask, past_key_values=read.past_key_values)
            hidden = torch.cat([hidden, states.last_hidden_state.to(device)], 1)
        sums = torch.zeros(ids.shape, dtype=torch.float64, device=device)
        sums[there] = -token_losses(loaded.model, hidden[there], ids[there]).double()
    return sums.sum(1).cpu()


def _shifted(rows: torch.Tensor, by: Sequence[int]) -> torch.Tensor:
    return torch.stack([row.roll(count) for row, count in zip(rows, by, strict=True)])
