"""Is the answer to the point: three scorers, each with a name, whose numbers are never mixed.

* **judge**: another model reads question and answer and is asked whether the one answers the other; the
  score is p(yes) / (p(yes) + p(no)) at its next token, in [0, 1].  No sampling, no parsing of prose.
* **chrf**: chrF (Popović 2015, sacrebleu's defaults) against a reference in the target language, / 100.
* **likelihood**: exp of the mean log-likelihood (nats a token) of the answer after the question, by the
  unedited model: the geometric mean of the probabilities of its tokens, in [0, 1].  It knows nothing of
  languages, so an answer in another language than the question's is less likely for that alone.

An empty answer scores 0.  CLaS-Bench (arXiv 2601.08331) uses a judge; chrF and likelihood are what is at
hand without one, and their numbers are not to be set beside a judge's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from editing.evaluation.asking import CHAT, Asked, chat_tokens, question_style
from editing.evaluation.generation import Continuation, encoded, prompt_rows
from neurons.architectures.sites import logits
from neurons.errors import UsageError
from neurons.models.next_token import positions_at_once, token_losses
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import forward
from neurons.text.batches import row_batches

JUDGE, CHRF, LIKELIHOOD = "judge", "chrf", "likelihood"
SCORERS = (JUDGE, CHRF, LIKELIHOOD)
JUDGE_PROMPT = (
    "Here is a question and an answer to it, which may be in another language.\n\n"
    "Question: {question}\n\nAnswer: {answer}\n\n"
    "Does the answer address the question, whatever its language? Reply with Yes or No."
)
# Without a chat template the model is to go on with the reply.
JUDGE_COMPLETION = "\n\nReply:"
_YES, _NO = ("Yes", " Yes", "yes", " yes", "YES"), ("No", " No", "no", " no", "NO")


class Scorer(Protocol):
    """Scores answers; ``name`` is one of ``SCORERS``."""

    @property
    def name(self) -> str: ...

    def __call__(self, asked: Sequence[Asked], answers: Sequence[Continuation]) -> list[float]:
        """A score in [0, 1] for each."""


@dataclass(frozen=True)
class JudgeScorer:
    """p(yes) of another model.

    Attributes:
        judge: the model that judges.
    """

    judge: LoadedModel
    name: str = JUDGE

    def __call__(self, asked: Sequence[Asked], answers: Sequence[Continuation]) -> list[float]:
        yes, no = _first_tokens(self.judge, _YES), _first_tokens(self.judge, _NO)
        only_yes, only_no = sorted(yes - no), sorted(no - yes)
        if not only_yes or not only_no:
            raise UsageError(
                f"{self.judge.name}: its tokenizer cannot tell Yes from No: choose another judge"
            )
        rows, places = [], []
        for place, (one, answer) in enumerate(zip(asked, answers, strict=True)):
            if answer.text.strip():
                rows.append(self._row(one.text, answer.text.strip()))
                places.append(place)
        scores = [0.0] * len(asked)
        for batch in row_batches(rows, uncounted=0):
            on_device = batch.to(self.judge.device)
            last = on_device.attention.sum(1) - 1
            with torch.no_grad():
                hidden = forward(self.judge.model, on_device)[
                    torch.arange(len(last), device=last.device), last
                ]
                found = torch.cat(
                    [
                        logits(self.judge.model, some)[:, [*only_yes, *only_no]].double().cpu()
                        for some in hidden.split(positions_at_once(self.judge.model))
                    ]
                )
            of_yes = found.softmax(-1)[:, : len(only_yes)].sum(1)
            for row, score in zip(batch.line_numbers.tolist(), of_yes.tolist(), strict=True):
                scores[places[row]] = score
        return scores

    def _row(self, question: str, answer: str) -> list[int]:
        text = JUDGE_PROMPT.format(question=question, answer=answer)
        tokenizer = self.judge.tokenizer
        asked_in_chat = question_style(tokenizer) == CHAT
        prompt = (
            chat_tokens(tokenizer, text, "choose another judge") if asked_in_chat else text + JUDGE_COMPLETION
        )
        return prompt_rows(self.judge.name, tokenizer, [prompt], self.judge.embedding_rows)[0]


@dataclass(frozen=True)
class ChrfScorer:
    """chrF against each item's reference."""

    name: str = CHRF

    def __call__(self, asked: Sequence[Asked], answers: Sequence[Continuation]) -> list[float]:
        from sacrebleu.metrics import CHRF as Chrf  # noqa: N811

        metric = Chrf()
        lacking = sum(one.reference is None for one in asked)
        if lacking:
            raise UsageError(
                f"{lacking} of {len(asked)} prompts have no reference: chrF needs parallel text, or questions "
                "with a column reference"
            )
        return [
            metric.sentence_score(answer.text, [one.reference or ""]).score / 100
            if answer.text.strip()
            else 0.0
            for one, answer in zip(asked, answers, strict=True)
        ]


@dataclass(frozen=True)
class LikelihoodScorer:
    """The unedited model's likelihood of the answer after the question.

    Attributes:
        loaded: the unedited model: call the scorer where it is not steered.
    """

    loaded: LoadedModel
    name: str = LIKELIHOOD

    def __call__(self, asked: Sequence[Asked], answers: Sequence[Continuation]) -> list[float]:
        tokenizer = self.loaded.tokenizer
        rows, before, places = [], [], []
        for place, (one, answer) in enumerate(zip(asked, answers, strict=True)):
            if not answer.ids:
                continue
            ids = encoded(tokenizer, [one.given(tokenizer)])[0]
            rows.append([*ids, *answer.ids])
            before.append(len(ids))
            places.append(place)
        scores = [0.0] * len(asked)
        for batch in row_batches(rows, uncounted=0):
            on_device = batch.to(self.loaded.device)
            with torch.no_grad():
                hidden = forward(self.loaded.model, on_device)
            for i, row in enumerate(batch.line_numbers.tolist()):
                # After a prompt without a token the answer's first has nothing to follow.
                first, last = max(before[row], 1), len(rows[row])
                if last > first:
                    losses = token_losses(
                        self.loaded.model, hidden[i, first - 1 : last - 1], on_device.ids[i, first:last]
                    )
                    scores[places[row]] = math.exp(-float(losses.double().mean()))
        return scores


def harmonic_mean(first: float, second: float) -> float:
    """2ab / (a + b); 0 where both are 0."""
    return 2 * first * second / (first + second) if first + second else 0.0


@dataclass(frozen=True)
class Relevance:
    """What a scorer says of the answers of one way of steering.

    Attributes:
        scorer: its name, of ``SCORERS``.
        mean: of the scores.
        steering_score: harmonic mean of the language-forcing share and the mean score (CLaS-Bench).
        item_score: mean of the items' harmonic means (AxBench): an item that is not in the target has 0.
    """

    scorer: str
    mean: float
    steering_score: float
    item_score: float


def relevance(scorer: str, forced: Sequence[bool], scores: Sequence[float]) -> Relevance:
    """Both harmonic means of what was forced and what is to the point.

    Args:
        scorer: its name.
        forced: whether each answer is in the target language, and no failure.
        scores: of each answer.
    """
    share, mean = sum(forced) / len(forced), sum(scores) / len(scores)
    items = [harmonic_mean(float(own), score) for own, score in zip(forced, scores, strict=True)]
    return Relevance(scorer, mean, harmonic_mean(share, mean), sum(items) / len(items))


def _first_tokens(loaded: LoadedModel, spellings: Sequence[str]) -> set[int]:
    """The first token of each spelling."""
    found = (loaded.tokenizer(word, add_special_tokens=False)["input_ids"] for word in spellings)
    return {ids[0] for ids in found if ids}
