"""Evaluation: how well a model is steered, how well it writes, and what else changes, beside the unedited model.

The model answers prompts in the source language: questions (CLaS-Bench's protocol, arXiv 2601.08331), or openings of
held-out lines.  Measures of the answers:

* **share**: the target-language rate (CLaS-Bench's language-forcing share), and the source-language rate.  Empty
  answers and loops (``editing.evaluation.repetition``) are failures and count for no language.
* **ceiling**: the target-language rate of the unedited model's answers to target prompts.
* **agreement**: the fraction of answers that a second detector labels the same; not measured with a classifier of
  the user's (``editing.evaluation.classifier``), which takes the place of language identification everywhere.
* **sentence share**: the mean fraction of an answer's sentences that are in the target.
* **fluency gap**: the mean negative log-likelihood (nats a token) of the steered answers minus that of the unedited
  model's answers to target prompts; the unedited model reads both, without their prompts.  0: as fluent as the
  unedited model in that language; above 1: word salad.
* **distinct**: the mean fraction of distinct words in an answer; **distinct pairs**: of bigrams of words;
  **longest repeat**: the mean fraction of an answer's words in its longest repeated passage.
* **relevance**, with a scorer (``editing.evaluation.relevance``), and its harmonic means with the share.
* **others**: the same for answers to prompts in every other language, with that language wanted, and
  SteeringControl's effectiveness and entanglement (``editing.evaluation.entanglement``).

Measures of held-out text:

* **NLL rise**: for each language, nats a token, steered minus unedited.
* **KL**: of next-token distributions, unedited to steered, for each language but source and target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any

from editing.evaluation.answers import Answers, identify_answers
from editing.evaluation.asking import Prompt, openings, question_prompts
from editing.evaluation.classifier import LANGUAGE_IDENTIFICATION, Classifier
from editing.evaluation.entanglement import effectiveness, entanglement
from editing.evaluation.generation import (
    NEW_TOKENS,
    TEMPERATURE,
    Continuation,
    check_samples,
    generate,
    prompt_rows,
)
from editing.evaluation.language_id import EMPTY, agreement, second_opinion
from editing.evaluation.likelihood import (
    Steering,
    UneditedText,
    continuation_nll,
    read_again,
    read_unedited,
    unedited_head,
)
from editing.evaluation.outcome import OtherLanguage, Outcome, Sample
from editing.evaluation.questions import Questions
from editing.evaluation.relevance import Scorer, relevance
from neurons.errors import UsageError
from neurons.models.memory import kept_bytes, room
from neurons.models.source import LoadedModel
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus
from neurons.text.token_budget import LOSSES, text_read
from neurons.text.words import distinct_rate

SAMPLES_SHOWN = 5
KEPT_FRACTION = 1 / 4  # of the working memory, that kept hidden states may fill
FEW_PROMPTS = 16
LOOPING = "looping"

# (prompts, maximum new tokens, temperature, seed) -> one continuation a prompt, as ``generate``.
Writer = Callable[[Sequence[str | Sequence[int]], int, float, int], list[Continuation]]


class Evaluation:
    """Measures how methods steer one model from a source to a target language on one corpus.

    Args:
        loaded: the unedited model.
        corpus: held-out text; the openings of its lines are the prompts if there are no questions.
        source: language of the prompts.
        target: language that the answers should be in.
        samples: answers a prompt.
        max_prompts: maximum number of prompts; None: all.
        seed: of the sampling.
        new_tokens: maximum tokens of an answer.
        temperature: 0 always takes the most likely token.
        questions: prompts in place of openings; a language without questions gets openings.
        chat: put questions through the tokenizer's chat template if it has one.
        scorer: of relevance; None: relevance is not measured.
        write: writes the answers, also while a steering context is entered; None writes with ``loaded``.
            Everything else is measured on ``loaded``.
        classifier: labels the answers; the languages are labels that it knows.

    Attributes:
        ceiling: target-language rate of the unedited model's answers to target prompts.
        read: the text of each language that likelihoods are measured on (``neurons.text.token_budget.text_read``).

    Raises:
        UsageError: a language that the corpus lacks or the classifier does not know, no question in the
            source language, several samples at temperature 0, or a chat template that fails.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        corpus: Corpus,
        source: str,
        target: str,
        *,
        samples: int = 1,
        max_prompts: int | None = None,
        seed: int = 0,
        new_tokens: int = NEW_TOKENS,
        temperature: float = TEMPERATURE,
        questions: Questions | None = None,
        chat: bool = True,
        scorer: Scorer | None = None,
        write: Writer | None = None,
        classifier: Classifier = LANGUAGE_IDENTIFICATION,
    ) -> None:
        check_samples(samples, temperature)
        corpus.require(source, target)
        if source == target:
            raise UsageError(f"source and target are both {source!r}")
        classifier.require(corpus.languages)
        if questions is not None and source not in questions.of:
            raise UsageError(f"there is no question in the source language {source!r}")
        self._loaded, self._corpus = loaded, corpus
        self.source, self.target = source, target
        self._seed, self._new_tokens, self._temperature = seed, new_tokens, temperature
        self._questions, self._chat, self._scorer = questions, chat, scorer
        self._write: Writer = partial(generate, loaded) if write is None else write
        self._samples, self._max_prompts = samples, max_prompts
        self.classifier = classifier
        self._prompts = {language: self._prompts_of(language) for language in (source, target)}
        self._batches = language_batches(loaded, corpus, default=LOSSES.tokens)
        self.read = text_read(corpus, self._batches)
        self._unedited_answers: dict[str, Answers] = {}
        self._unedited_nll: dict[str, float] = {}
        self.ceiling = self._answers_unedited(target).rate(target)

    @cached_property
    def base(self) -> Outcome:
        """The Outcome of the unedited model."""
        return self.measure("base", nullcontext)

    @property
    def continuations(self) -> int:
        """Number of answers that each rate is over."""
        return len(self._prompts[self.source])

    @property
    def source_rows(self) -> list[list[int]]:
        """The tokens of each prompt in the source language, without repeats for samples."""
        prompts = self._prompts[self.source][: len(self._prompts[self.source]) // self._samples]
        inputs = [prompt.model_input(self._loaded.tokenizer) for prompt in prompts]
        return prompt_rows(self._loaded.name, self._loaded.tokenizer, inputs, self._loaded.embedding_rows)

    @property
    def ceiling_from(self) -> str:
        """Style of the prompts in the target language: "opening", "completion" or "chat"."""
        return self._prompts[self.target][0].style

    @property
    def prompt_style(self) -> str:
        """Style of the prompts in the source language: "opening", "completion" or "chat"."""
        return self._prompts[self.source][0].style

    def measure(
        self,
        name: str,
        steering: Steering,
        details: dict[str, Any] | None = None,
        kl: bool = False,
        *,
        others: bool = False,
        instruction: str | None = None,
        harm: bool = True,
    ) -> Outcome:
        """Measure the model while ``steering()`` is entered.

        Args:
            name: for the Outcome.
            steering: makes a context in which the model is steered; entered several times.  ``nullcontext``
                is the unedited model, which is measured once.
            details: kept in the Outcome.
            kl: also measure KL.
            others: also measure answers to prompts in every other language.
            instruction: added to every prompt in the source language, and to no other.
            harm: measure likelihoods of the text; otherwise ``nll`` and ``nll_rise`` are empty
                (``with_harm`` adds them).
        """
        other_languages = self._other_languages if others else ()
        unedited = {language: self._answers_unedited(language) for language in other_languages}
        if steering is nullcontext and instruction is None:
            answers, of_others = self._answers_unedited(self.source), unedited
            nll = self._nll_unedited(self.source)
        else:
            with steering():
                answers = self._answers(self.source, instruction)
                of_others = {language: self._answers(language) for language in other_languages}
            nll = continuation_nll(self._loaded, answers.items)
        forced = answers.in_language(self.target)
        labels = answers.labels
        prompts = self._prompts[self.source]
        texts = [item.text for item in answers.items]
        languages = self._corpus.languages
        agreed = math.nan
        if self.classifier.identifies_languages:
            agreed = agreement(labels, [second_opinion(text, languages) for text in texts])
        score = None
        if self._scorer is not None:
            score = relevance(self._scorer.name, forced, self._scorer(prompts, answers.items))
        base_rate = self._answers_unedited(self.source).rate(self.target) if others else 0.0
        outcome = Outcome(
            name=name,
            target_share=answers.rate(self.target),
            source_share=answers.rate(self.source),
            distinct=sum(distinct_rate(text) for text in texts) / len(texts),
            fluency_gap=nll - self._nll_unedited(self.target),
            nll={},
            nll_rise={},
            kl={},
            languages_found={label: labels.count(label) for label in sorted(set(labels))},
            samples=tuple(
                Sample(prompt.text, item.text, label)
                for prompt, item, label in zip(prompts[:SAMPLES_SHOWN], answers.items, labels, strict=False)
            ),
            details=details or {},
            failures={
                EMPTY: labels.count(EMPTY),
                LOOPING: sum(
                    loop and label != EMPTY for loop, label in zip(answers.looping, labels, strict=True)
                ),
            },
            agreement=agreed,
            sentence_share=sum(self.classifier.sentence_share(text, self.target, languages) for text in texts)
            / len(texts),
            distinct_pairs=answers.distinct_pairs,
            longest_repeat=answers.longest_repeat,
            answer_words=answers.words,
            relevance={} if score is None else asdict(score),
            others={
                language: self._other(language, steered, unedited[language])
                for language, steered in of_others.items()
            },
            effectiveness=effectiveness(answers.rate(self.target), base_rate) if others else None,
            entanglement=entanglement(
                {language: steered.rate(language) for language, steered in of_others.items()},
                {language: base.rate(language) for language, base in unedited.items()},
            ),
        )
        return self.with_harm(outcome, steering, kl) if harm else outcome

    def with_harm(self, outcome: Outcome, steering: Steering, kl: bool = False) -> Outcome:
        """The outcome with likelihoods of the text, and KL if ``kl``, measured while ``steering()`` is entered."""
        third = [k for k in self._corpus.languages if k not in (self.source, self.target)] if kl else []
        unedited = self._unedited  # read before the model is steered
        if steering is nullcontext:
            read = {language: (text.nll, 0.0) for language, text in unedited.items()}
        else:
            with steering():
                read = {
                    language: read_again(self._loaded, text, kl=language in third and text.hidden is not None)
                    for language, text in unedited.items()
                }
        divergences = {k: read[k][1] for k in third}
        for language in third:
            # The hidden states of all languages did not fit into memory: keep those of one at a time.
            if unedited[language].hidden is None and steering is not nullcontext:
                text = read_unedited(self._loaded, self._batches[language], unedited_head(self._loaded))
                with steering():
                    divergences[language] = read_again(self._loaded, text, nll=False)[1]
        nll = {language: value for language, (value, _) in read.items()}
        rise = {language: value - unedited[language].nll for language, value in nll.items()}
        return replace(outcome, nll=nll, nll_rise=rise, kl=divergences)

    def rate_on_few_prompts(self, steering: Steering, instruction: str | None = None) -> float:
        """Target-language rate on the first ``FEW_PROMPTS`` prompts: enough to reject what does not steer."""
        with steering():
            return self._written(self._prompts[self.source][:FEW_PROMPTS], instruction).rate(self.target)

    @cached_property
    def _other_languages(self) -> tuple[str, ...]:
        return tuple(language for language in self._corpus.languages if language != self.source)

    def _prompts_of(self, language: str) -> list[Prompt]:
        if self._questions is not None and language in self._questions.of:
            prompts = question_prompts(
                self._loaded.tokenizer, self._questions, language, self._max_prompts, self._chat
            )
        else:
            prompts = openings(self._corpus, language, self.target, self._max_prompts)
        return prompts * self._samples

    def _written(self, prompts: Sequence[Prompt], instruction: str | None) -> Answers:
        inputs = [prompt.model_input(self._loaded.tokenizer, instruction) for prompt in prompts]
        items = self._write(inputs, self._new_tokens, self._temperature, self._seed)
        return identify_answers(items, self._corpus.languages, self.classifier)

    def _answers(self, language: str, instruction: str | None = None) -> Answers:
        if language not in self._prompts:
            self._prompts[language] = self._prompts_of(language)
        return self._written(self._prompts[language], instruction)

    def _answers_unedited(self, language: str) -> Answers:
        if language not in self._unedited_answers:
            self._unedited_answers[language] = self._answers(language)
        return self._unedited_answers[language]

    def _nll_unedited(self, language: str) -> float:
        if language not in self._unedited_nll:
            answers = self._answers_unedited(language)
            self._unedited_nll[language] = continuation_nll(self._loaded, answers.items)
        return self._unedited_nll[language]

    @cached_property
    def _unedited(self) -> dict[str, UneditedText]:
        """Every language's text as the unedited model reads it, with third languages' hidden states if they fit."""
        third = [k for k in self._corpus.languages if k not in (self.source, self.target)]
        tokens = sum(batch.ids.numel() for k in third for batch in self._batches[k])
        keep = kept_bytes(self._loaded, tokens) <= room(self._loaded) * KEPT_FRACTION
        head = unedited_head(self._loaded) if keep else None
        return {
            language: read_unedited(self._loaded, batches, head if language in third else None)
            for language, batches in self._batches.items()
        }

    def _other(self, language: str, steered: Answers, unedited: Answers) -> OtherLanguage:
        gap = continuation_nll(self._loaded, steered.items) - self._nll_unedited(language)
        return OtherLanguage(
            share=steered.rate(language),
            ceiling=unedited.rate(language),
            fluency_gap=None if math.isnan(gap) else gap,
            distinct_pairs=steered.distinct_pairs,
            longest_repeat=steered.longest_repeat,
            answer_words=steered.words,
        )
