"""Relevance of answers, by one of three scorers whose scores do not compare with each other.

* **judge**: another model reads the question and the answer, and is asked whether the answer addresses the
  question.  The score is p(yes) / (p(yes) + p(no)) at the next token, in [0, 1].  Nothing is sampled or parsed.
* **chrf**: chrF (Popović 2015, sacrebleu's defaults) against a reference in the target language, / 100.
* **likelihood**: exp of the mean log-likelihood (nats a token) of the answer after the question, by the
  unedited model: the geometric mean of the probabilities of its tokens, in [0, 1].  An answer in another language
  than the question is less likely for that reason alone.

An answer without a character but white space scores 0.  CLaS-Bench (arXiv 2601.08331) uses a judge; chrF and likelihood
need none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from editing.evaluation.asking import CHAT, Prompt, chat_tokens, question_style
from editing.evaluation.generation import Continuation, encoded, prompt_rows
from neurons.architectures.sites import logits
from neurons.errors import UsageError
from neurons.models.next_token import positions_at_once, token_losses
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import forward
from neurons.text.batches import fitting_batches

JUDGE, CHRF, LIKELIHOOD = "judge", "chrf", "likelihood"
SCORERS = (JUDGE, CHRF, LIKELIHOOD)
JUDGE_PROMPT = (
    "Here is a question and an answer to it, which may be in another language.\n\n"
    "Question: {question}\n\nAnswer: {answer}\n\n"
    "Does the answer address the question, whatever its language? Reply with Yes or No."
)
# Without a chat template the model continues with the reply.
JUDGE_COMPLETION = "\n\nReply:"
_YES, _NO = ("Yes", " Yes", "yes", " yes", "YES"), ("No", " No", "no", " no", "NO")


class Scorer(Protocol):
    """Scores answers; ``name`` is one of ``SCORERS``."""

    @property
    def name(self) -> str: ...

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Continuation]) -> list[float]:
        """The score of each answer, in [0, 1]."""


@dataclass(frozen=True)
class JudgeScorer:
    """p(yes) of a judge.

    Attributes:
        judge: the model that judges.
    """

    judge: LoadedModel
    name: str = JUDGE

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Continuation]) -> list[float]:
        yes, no = _first_tokens(self.judge, _YES), _first_tokens(self.judge, _NO)
        only_yes, only_no = sorted(yes - no), sorted(no - yes)
        if not only_yes or not only_no:
            raise UsageError(
                f"{self.judge.name}: its tokenizer cannot tell Yes from No: choose another judge"
            )
        rows, indices = [], []
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            if answer.text.strip():
                rows.append(self._row(prompt.text, answer.text.strip()))
                indices.append(index)
        scores = [0.0] * len(prompts)
        for batch in fitting_batches(self.judge, rows, 0):
            on_device = batch.to(self.judge.device)
            last = on_device.attention.sum(1) - 1
            with torch.no_grad():
                hidden = forward(self.judge.model, on_device)[
                    torch.arange(len(last), device=last.device), last
                ]
                yes_no_logits = torch.cat(
                    [
                        logits(self.judge.model, chunk)[:, [*only_yes, *only_no]].double().cpu()
                        for chunk in hidden.split(positions_at_once(self.judge.model))
                    ]
                )
            p_yes = yes_no_logits.softmax(-1)[:, : len(only_yes)].sum(1)
            for row, score in zip(batch.line_numbers.tolist(), p_yes.tolist(), strict=True):
                scores[indices[row]] = score
        return scores

    def _row(self, question: str, answer: str) -> list[int]:
        text = JUDGE_PROMPT.format(question=question, answer=answer)
        tokenizer = self.judge.tokenizer
        chat = question_style(tokenizer) == CHAT
        prompt = (
            chat_tokens(tokenizer, text, "choose another judge", thinks=False)
            if chat
            else text + JUDGE_COMPLETION
        )
        return prompt_rows(self.judge.name, tokenizer, [prompt], self.judge.embedding_rows)[0]


@dataclass(frozen=True)
class ChrfScorer:
    """chrF against the reference of each prompt."""

    name: str = CHRF

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Continuation]) -> list[float]:
        from sacrebleu.metrics import CHRF as Chrf  # noqa: N811

        metric = Chrf()
        missing = sum(prompt.reference is None for prompt in prompts)
        if missing:
            raise UsageError(
                f"{missing} of {len(prompts)} prompts have no reference: chrF needs parallel text, or questions "
                "with a column reference"
            )
        return [
            metric.sentence_score(answer.text, [prompt.reference or ""]).score / 100
            if answer.text.strip()
            else 0.0
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


@dataclass(frozen=True)
class LikelihoodScorer:
    """The unedited model's likelihood of the answer after the question.

    Attributes:
        loaded: the unedited model, which must not be steered during the call.
    """

    loaded: LoadedModel
    name: str = LIKELIHOOD

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Continuation]) -> list[float]:
        tokenizer = self.loaded.tokenizer
        rows, prompt_lengths, indices = [], [], []
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            if not answer.ids or not answer.text.strip():
                continue
            ids = encoded(tokenizer, [prompt.model_input(tokenizer)])[0]
            rows.append([*ids, *answer.ids])
            prompt_lengths.append(len(ids))
            indices.append(index)
        scores = [0.0] * len(prompts)
        for batch in fitting_batches(self.loaded, rows, 0):
            on_device = batch.to(self.loaded.device)
            with torch.no_grad():
                hidden = forward(self.loaded.model, on_device)
            for i, row in enumerate(batch.line_numbers.tolist()):
                # After an empty prompt, the first token of the answer is not predicted.
                first, last = max(prompt_lengths[row], 1), len(rows[row])
                if last > first:
                    losses = token_losses(
                        self.loaded.model, hidden[i, first - 1 : last - 1], on_device.ids[i, first:last]
                    )
                    scores[indices[row]] = math.exp(-float(losses.double().mean()))
        return scores


def harmonic_mean(first: float, second: float) -> float:
    """2ab / (a + b); 0 if both are 0."""
    return 2 * first * second / (first + second) if first + second else 0.0


@dataclass(frozen=True)
class Relevance:
    """Relevance of the answers under one method.

    Attributes:
        scorer: one of ``SCORERS``.
        mean: mean score.
        steering_score: harmonic mean of the target-language rate and the mean score (CLaS-Bench).
        item_score: mean over answers of the harmonic mean (AxBench); an answer not in the target has 0.
    """

    scorer: str
    mean: float
    steering_score: float
    item_score: float


def relevance(scorer: str, forced: Sequence[bool], scores: Sequence[float]) -> Relevance:
    """The mean score and both harmonic means.

    Args:
        scorer: its name.
        forced: whether each answer is in the target language and not a failure.
        scores: of each answer.
    """
    rate, mean = sum(forced) / len(forced), sum(scores) / len(scores)
    items = [harmonic_mean(float(hit), score) for hit, score in zip(forced, scores, strict=True)]
    return Relevance(scorer, mean, harmonic_mean(rate, mean), sum(items) / len(items))


def _first_tokens(loaded: LoadedModel, spellings: Sequence[str]) -> set[int]:
    """The first token of each spelling."""
    encodings = (loaded.tokenizer(word, add_special_tokens=False)["input_ids"] for word in spellings)
    return {ids[0] for ids in encodings if ids}
