"""Whether a model knows the right one of four choices: a comparison of the letters that its answer may begin with.

The user message is the question, the four choices behind their letters and the request for a letter
(``editing.evaluation.choices``), rendered by the model's chat template up to the start of the answer.  Scored is the
next token: the log-probability of each of the letters A, B, C and D given that it is one of these four, in float64 from
the last hidden state and the four rows of the output embeddings.  What the model would say instead of a letter does not
count, so a model that now begins its answers in another language is not charged for it.

An item is right if the log-probability of its answer's letter is greater than that of each other letter: a tie is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from editing.evaluation.choices import LETTERS
from editing.evaluation.generation import prompt_rows
from neurons.architectures.offload import parameter_value
from neurons.architectures.sites import logits
from neurons.errors import UsageError
from neurons.models.memory import MAX_TOKENS, batches_for
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Progress, forward
from neurons.text.batches import context_length, row_batches
from neurons.text.conversations import rendered


def letter_log_probabilities(
    loaded: LoadedModel, questions: Sequence[str], progress: Progress | None = None
) -> torch.Tensor:
    """float64 [n, 4]: log-probabilities of the letters as the first token of each answer; their exponentials sum to 1.

    Args:
        loaded: the model as it now computes, with a chat template.
        questions: user messages; at least one.
        progress: called with the number of questions of each batch.

    Raises:
        UsageError: a template that fails or drops the question, a question longer than the model's context, or a
            tokenizer in which a letter after the prompt is not a token of its own.
    """
    texts = [rendered(loaded.tokenizer, [{"role": "user", "content": text}], True) for text in questions]
    ids = loaded.tokenizer(texts, add_special_tokens=False)["input_ids"]
    rows = prompt_rows(loaded.name, loaded.tokenizer, ids, loaded.embedding_rows)
    longest, context = max(map(len, rows)), context_length(loaded.model)
    if context is not None and longest > context:
        raise UsageError(f"a question has {longest} tokens, but the model reads {context}: shorten it")
    letters = _letter_tokens(loaded, texts[0], rows[0])
    output = loaded.model.get_output_embeddings()
    values = {
        name: parameter_value(output, name)[letters].to(loaded.device).double()
        for name, _ in output.named_parameters(recurse=False)
    }
    result = torch.empty(len(rows), len(LETTERS), dtype=torch.float64)
    at_once = min(MAX_TOKENS, batches_for(loaded, False, longest)[0])
    for batch in row_batches(rows, 0, tokens_a_batch=at_once):
        last = batch.attention.sum(1) - 1
        with torch.no_grad():
            hidden = forward(loaded.model, batch.to(loaded.device))[torch.arange(len(last)), last].double()
            made = logits(loaded.model, hidden, lambda x: torch.nn.functional.linear(x, **values))
        result[batch.line_numbers] = made.log_softmax(-1).cpu()
        if progress is not None:
            progress(len(last))
    return result


def right(log_probabilities: torch.Tensor, answers: Sequence[int]) -> list[bool]:
    """Whether the answer's letter is more probable than each other letter.

    Args:
        log_probabilities: [n, 4].
        answers: index of the right letter of each item.
    """
    rows = torch.arange(len(answers))
    others = log_probabilities.clone()
    others[rows, list(answers)] = -torch.inf
    hits: list[bool] = (log_probabilities[rows, list(answers)] > others.amax(1)).tolist()
    return hits


def _letter_tokens(loaded: LoadedModel, text: str, row: Sequence[int]) -> list[int]:
    """The token of each letter after a rendered prompt, and so after every prompt: all end in the same header."""
    continued = loaded.tokenizer([text + letter for letter in LETTERS], add_special_tokens=False)["input_ids"]
    letters = {ids[-1] for ids in continued}
    if len(letters) < len(LETTERS) or any(ids[:-1] != list(row) for ids in continued):
        raise UsageError(
            f"{loaded.name}: a letter after the prompt is not a token of its own, so choices cannot be compared: give "
            "another model"
        )
    return [ids[-1] for ids in continued]
