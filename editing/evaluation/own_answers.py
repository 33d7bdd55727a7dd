"""The unedited model's own answers as text whose likelihood is measured: prompts are read, answers are counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from editing.evaluation.generation import Continuation
from neurons.models.source import LoadedModel
from neurons.text.batches import TokenBatch, fitting_batches


def answer_batches(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], answers: Sequence[Continuation]
) -> list[TokenBatch]:
    """Prompts followed by their answers; counted are the tokens of the answers.

    Args:
        loaded: the model, for the size of a batch.
        prompts: token ids.
        answers: one to each prompt.
    """
    rows = [[*prompt, *answer.ids] for prompt, answer in zip(prompts, answers, strict=True)]
    batches = []
    for batch in fitting_batches(loaded, rows, 0):
        counted = batch.counted.clone()
        for row, line in enumerate(batch.line_numbers.tolist()):
            counted[row, : len(prompts[line])] = False
        batches.append(replace(batch, counted=counted))
    return batches
