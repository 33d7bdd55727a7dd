"""Does it steer, does it still write well, and what else changed: every figure beside the unedited model.

The model writes on prompts of the source language: questions (CLaS-Bench's protocol, arXiv 2601.08331), or the
openings of held-out lines.  Of what it writes:

* **share**: answers identified as the target (CLaS-Bench's language-forcing share), or as the source.  An
  empty answer and one that goes round in circles (``editing.evaluation.repetition``) are failures: no share counts them.
* **ceiling**: the share of the target among the unedited model's own answers to target prompts.
* **agreement**: share of answers of which a second detector says the same; **sentence share**: mean share
  of an answer's sentences that are in the target.
* **fluency gap**: mean negative log-likelihood a token (nats) of the steered answers, read without
  their prompts by the unedited model, minus that of the unedited model's answers to target
  prompts.  0: as fluent as the model ever is in that language; above 1: word salad.
* **distinct**: mean share of distinct words in an answer; **distinct pairs**: of runs of two words;
  **longest repeat**: mean share of an answer's words in the longest passage that it repeats.
* **relevance**, where a scorer is given (``editing.evaluation.relevance``), and its harmonic means with the share.
* **NLL rise**: of held-out text in each language, nats a token, steered minus unedited.
* **KL**: of next-token distributions, unedited to steered, on the text of each language but source and target.
* **others**: the same of answers to prompts of every other language, where that language is wanted; with
  SteeringControl's effectiveness and entanglement (``editing.evaluation.entanglement``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any

from editing.evaluation.answers import Answers, identified
from editing.evaluation.asking import Asked, openings, questions_asked
from editing.evaluation.entanglement import effectiveness, entanglement
from editing.evaluation.generation import NEW_TOKENS, TEMPERATURE, Continuation, check_samples, generate
from editing.evaluation.language_id import EMPTY, agreement, check_languages, second_opinion, sentence_share
from editing.evaluation.likelihood import Steering, UneditedText, continuation_nll, read_again, read_unedited
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
KEPT_SHARE = 1 / 4  # of the room for work, that hidden states may take
FEW = 16
LOOPING = "looping"

# Prompts, most new tokens, temperature and seed to one continuation a prompt, as ``generate`` has them.
Writer = Callable[[Sequence[str | Sequence[int]], int, float, int], list[Continuation]]


class Evaluation:
    """Measures ways of steering one model from a source to a target language on one corpus.

    Args:
        loaded: the unedited model.
        corpus: held-out text; its lines' openings are the prompts where there are no questions.
        source: language of the prompts.
        target: language that the answers are to be in.
        samples: answers a prompt.
        most_prompts: at most so many prompts.
        seed: of the sampling.
        new_tokens: an answer's at most.
        temperature: 0 takes the likeliest token always.
        questions: what is asked in place of openings; languages that have none are given openings.
        chat: ask them through the tokenizer's chat template where it has one.
        scorer: of relevance; None measures none.
        write: writes the answers, unedited or as the steering around the call has it; None writes with
            ``loaded``.  All else is measured on ``loaded``.

    Attributes:
        ceiling: share of the target among the unedited model's answers to target prompts.
        read: what of each language likelihoods are measured on (``neurons.text.token_budget.text_read``).

    Raises:
        UsageError: a language that the corpus lacks or the identifier does not know, no question in the
            source language, several samples at temperature 0, or a chat template that cannot be used.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        corpus: Corpus,
        source: str,
        target: str,
        *,
        samples: int = 1,
        most_prompts: int | None = None,
        seed: int = 0,
        new_tokens: int = NEW_TOKENS,
        temperature: float = TEMPERATURE,
        questions: Questions | None = None,
        chat: bool = True,
        scorer: Scorer | None = None,
        write: Writer | None = None,
    ) -> None:
        check_samples(samples, temperature)
        corpus.require(source, target)
        if source == target:
            raise UsageError(f"source and target are both {source!r}")
        check_languages(corpus.languages)
        if questions is not None and source not in questions.of:
            raise UsageError(f"there is no question in the source language {source!r}")
        self._loaded, self._corpus = loaded, corpus
        self.source, self.target = source, target
        self._seed, self._new_tokens, self._temperature = seed, new_tokens, temperature
        self._questions, self._chat, self._scorer = questions, chat, scorer
        self._write: Writer = partial(generate, loaded) if write is None else write
        self._samples, self._most = samples, most_prompts
        self._asked = {language: self._prompts_of(language) for language in (source, target)}
        self._batches = language_batches(loaded, corpus, default=LOSSES.tokens)
        self.read = text_read(corpus, self._batches)
        self._own: dict[str, Answers] = {}
        self._own_nll: dict[str, float] = {}
        self.ceiling = self._own_answers(target).share(target)

    @cached_property
    def base(self) -> Outcome:
        """The unedited model's Outcome."""
        return self.measure("base", nullcontext)

    @property
    def continuations(self) -> int:
        """Number of answers that each share is over."""
        return len(self._asked[self.source])

    @property
    def ceiling_from(self) -> str:
        """What the unedited model's own answers in the target language are on: "opening", "completion" or
        "chat"."""
        return self._asked[self.target][0].style

    @property
    def prompt_style(self) -> str:
        """How the source language is asked: "opening", "completion" or "chat"."""
        return self._asked[self.source][0].style

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
                is the unedited model, of which nothing is measured twice.
            details: kept in the Outcome.
            kl: measure KL too.
            others: let it answer prompts of every other language too.
            instruction: put to every prompt of the source language, and to nothing else.
            harm: measure likelihoods of the text; without it ``nll`` and ``nll_rise`` are empty
                (``with_harm`` adds them).
        """
        elsewhere = self._other_languages if others else ()
        own = {language: self._own_answers(language) for language in elsewhere}
        if steering is nullcontext and instruction is None:
            answers, of_others = self._own_answers(self.source), own
            own_nll = self._nll_of_own(self.source)
        else:
            with steering():
                answers = self._answers(self.source, instruction)
                of_others = {language: self._answers(language) for language in elsewhere}
            own_nll = continuation_nll(self._loaded, answers.items)
        forced = answers.are(self.target)
        labels = answers.labels
        asked = self._asked[self.source]
        texts = [item.text for item in answers.items]
        second = [second_opinion(text, self._corpus.languages) for text in texts]
        score = None
        if self._scorer is not None:
            score = relevance(self._scorer.name, forced, self._scorer(asked, answers.items))
        base_share = self._own_answers(self.source).share(self.target) if others else 0.0
        found = Outcome(
            name=name,
            target_share=answers.share(self.target),
            source_share=answers.share(self.source),
            distinct=sum(distinct_rate(text) for text in texts) / len(texts),
            fluency_gap=own_nll - self._nll_of_own(self.target),
            nll={},
            nll_rise={},
            kl={},
            languages_found={label: labels.count(label) for label in sorted(set(labels))},
            samples=tuple(
                Sample(one.text, item.text, label)
                for one, item, label in zip(asked[:SAMPLES_SHOWN], answers.items, labels, strict=False)
            ),
            details=details or {},
            failures={EMPTY: labels.count(EMPTY), LOOPING: sum(answers.looping)},
            agreement=agreement(labels, second),
            sentence_share=sum(self._sentence_share(text) for text in texts) / len(texts),
            distinct_pairs=answers.distinct_pairs,
            longest_repeat=answers.longest_repeat,
            answer_words=answers.words,
            relevance={} if score is None else asdict(score),
            others={
                language: self._other(language, theirs, own[language])
                for language, theirs in of_others.items()
            },
            effectiveness=effectiveness(answers.share(self.target), base_share) if others else None,
            entanglement=entanglement(
                {language: theirs.share(language) for language, theirs in of_others.items()},
                {language: theirs.share(language) for language, theirs in own.items()},
            ),
        )
        return self.with_harm(found, steering, kl) if harm else found

    def with_harm(self, outcome: Outcome, steering: Steering, kl: bool = False) -> Outcome:
        """The outcome with the likelihoods of the text, and with ``kl`` KL, while ``steering()`` is entered."""
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
            # Hidden states of all languages had no room: those of one at a time have.
            if unedited[language].hidden is None and steering is not nullcontext:
                text = read_unedited(self._loaded, self._batches[language])
                with steering():
                    divergences[language] = read_again(self._loaded, text, nll=False)[1]
        nll = {language: value for language, (value, _) in read.items()}
        rise = {language: value - unedited[language].nll for language, value in nll.items()}
        return replace(outcome, nll=nll, nll_rise=rise, kl=divergences)

    def few(self, steering: Steering, instruction: str | None = None) -> float:
        """Share of the target among the answers to the first ``FEW`` prompts: enough to see what does not steer."""
        asked = self._asked[self.source][:FEW]
        with steering():
            found = self._write(
                [one.given(self._loaded.tokenizer, instruction) for one in asked],
                self._new_tokens,
                self._temperature,
                self._seed,
            )
        return identified(found, self._corpus.languages).share(self.target)

    @cached_property
    def _other_languages(self) -> tuple[str, ...]:
        return tuple(language for language in self._corpus.languages if language != self.source)

    def _prompts_of(self, language: str) -> list[Asked]:
        if self._questions is not None and language in self._questions.of:
            found = questions_asked(self._loaded.tokenizer, self._questions, language, self._most, self._chat)
        else:
            found = openings(self._corpus, language, self.target, self._most)
        return found * self._samples

    def _answers(self, language: str, instruction: str | None = None) -> Answers:
        if language not in self._asked:
            self._asked[language] = self._prompts_of(language)
        found = self._write(
            [one.given(self._loaded.tokenizer, instruction) for one in self._asked[language]],
            self._new_tokens,
            self._temperature,
            self._seed,
        )
        return identified(found, self._corpus.languages)

    def _own_answers(self, language: str) -> Answers:
        """The unedited model's."""
        if language not in self._own:
            self._own[language] = self._answers(language)
        return self._own[language]

    def _nll_of_own(self, language: str) -> float:
        if language not in self._own_nll:
            self._own_nll[language] = continuation_nll(self._loaded, self._own_answers(language).items)
        return self._own_nll[language]

    @cached_property
    def _unedited(self) -> dict[str, UneditedText]:
        """Every language's text as the unedited model reads it, third languages' hidden states kept where they fit."""
        third = [k for k in self._corpus.languages if k not in (self.source, self.target)]
        tokens = sum(batch.ids.numel() for k in third for batch in self._batches[k])
        keep = kept_bytes(self._loaded, tokens) <= room(self._loaded) * KEPT_SHARE
        return {
            language: read_unedited(self._loaded, some, keep and language in third)
            for language, some in self._batches.items()
        }

    def _other(self, language: str, found: Answers, own: Answers) -> OtherLanguage:
        gap = continuation_nll(self._loaded, found.items) - self._nll_of_own(language)
        return OtherLanguage(
            share=found.share(language),
            ceiling=own.share(language),
            fluency_gap=None if gap != gap else gap,
            distinct_pairs=found.distinct_pairs,
            longest_repeat=found.longest_repeat,
            answer_words=found.words,
        )

    def _sentence_share(self, text: str) -> float:
        return sentence_share(text, self.target, self._corpus.languages)
