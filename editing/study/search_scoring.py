"""Measures of a search's trials: those of ``editing.evaluation.evaluation``, with all that is constant computed once.

* **share**, **fluency gap** and **ceiling**: as defined there, on continuations of source-language prompts.
* **harm**: the mean over third languages (neither source nor target) of KL(unedited || edited) of the next-token
  distributions, nats.
* **rise**: the largest rise of the negative log-likelihood of a third language's text, nats a token.

The unedited model's final hidden states of the third languages' text are kept, so that a trial reads that text only
once, with the edited model, for likelihood and KL together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from editing.evaluation.answers import identify_answers
from editing.evaluation.classifier import LANGUAGE_IDENTIFICATION, Classifier
from editing.evaluation.generation import NEW_TOKENS, TEMPERATURE, Continuation, check_samples, generate
from editing.evaluation.likelihood import continuation_nll, read_again, read_unedited, unedited_head
from neurons.errors import BrocaError, UsageError
from neurons.models.source import LoadedModel
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus
from neurons.text.words import opening

MIN_CEILING = 0.2  # below it, the effect of an edit cannot be distinguished from noise


@dataclass(frozen=True)
class Harm:
    """The effect of an edit on third languages.

    Attributes:
        nll_rise: third language -> nats a token, edited minus unedited.
        kl: third language -> nats a position.
    """

    nll_rise: Mapping[str, float]
    kl: Mapping[str, float]

    @property
    def rise(self) -> float:
        """The largest NLL rise of a third language."""
        return max(self.nll_rise.values())


@dataclass(frozen=True)
class Written:
    """The continuations that an edited model wrote.

    Attributes:
        hits: number of continuations in the target that are not failures.
        continuations: number of continuations.
        prompts: number of different prompts.
        answers: the continuations.
    """

    hits: int
    continuations: int
    prompts: int
    answers: tuple[Continuation, ...]


class Scoring:
    """Measures edits of one model from a source to a target language on one part of a corpus.

    Args:
        loaded: the unedited model.
        corpus: text that the edits were not made from; the openings of its lines are the prompts.
        source: language that is steered from.
        target: language that is steered to; all other languages of the corpus are third languages.
        prompts: maximum number of prompts.
        samples: continuations a prompt.
        lines: maximum lines of each third language; None: all.
        seed: of the sampling, the same for every edit.
        new_tokens: maximum tokens of a continuation.
        temperature: 0 always takes the most likely token.
        classifier: labels the continuations; the corpus's languages are labels that it knows.

    Attributes:
        ceiling: target-language rate of the unedited model's continuations of target prompts.

    Raises:
        UsageError: a language that the corpus lacks or the classifier does not know, no third language, or
            several samples at temperature 0.
        BrocaError: the ceiling is below ``MIN_CEILING``.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        corpus: Corpus,
        source: str,
        target: str,
        *,
        prompts: int = 50,
        samples: int = 1,
        lines: int | None = None,
        seed: int = 0,
        new_tokens: int = NEW_TOKENS,
        temperature: float = TEMPERATURE,
        classifier: Classifier = LANGUAGE_IDENTIFICATION,
    ) -> None:
        check_samples(samples, temperature)
        self.source, self.target = source, target
        self.third = third_languages(corpus, source, target)
        classifier.require(corpus.languages)
        self._classifier = classifier
        self._loaded, self._languages = loaded, corpus.languages
        self._seed, self._new_tokens, self._temperature = seed, new_tokens, temperature
        openings = {
            language: [opening(text) for text in list(filter(None, corpus.lines(language)))[:prompts]]
            for language in (source, target)
        }
        self._openings = openings[source]
        self._prompts = openings[source] * samples
        unedited = self._continue(openings[target] * samples, seed)
        self.ceiling = self._hits(unedited) / len(unedited)
        if self.ceiling < MIN_CEILING:
            raise BrocaError(
                f"the unedited model answers {target} prompts in {target} only {self.ceiling:.0%} of the time, so "
                "edits cannot be compared: choose another target, or a model that writes it"
            )
        self._unedited_nll = continuation_nll(loaded, unedited)
        read = replace(corpus, texts={k: tuple(corpus.non_empty(k)[:lines]) for k in self.third})
        head = unedited_head(loaded)
        self._texts = {
            name: read_unedited(loaded, batches, head)
            for name, batches in language_batches(loaded, read).items()
        }

    def few(self, prompts: int) -> tuple[int, int]:
        """(hits, continuations) of the model in its current state on the first ``prompts`` prompts."""
        answers = self._continue(self._openings[:prompts], self._seed)
        return self._hits(answers), len(answers)

    def harm(self) -> Harm:
        """The effect on third languages of the edit that is applied now."""
        read = {language: read_again(self._loaded, text) for language, text in self._texts.items()}
        return Harm(
            {name: nll - self._texts[name].nll for name, (nll, _) in read.items()},
            {name: kl for name, (_, kl) in read.items()},
        )

    def written(self, seed: int | None = None) -> Written:
        """The continuations of the model in its current state; ``seed`` replaces the search's seed."""
        answers = self._continue(self._prompts, self._seed if seed is None else seed)
        return Written(self._hits(answers), len(answers), len(self._openings), tuple(answers))

    def fluency_gap(self, written: Written) -> float:
        """The fluency gap of an edited model's continuations.  No edit may be applied during the call."""
        return continuation_nll(self._loaded, written.answers) - self._unedited_nll

    def _hits(self, answers: Sequence[Continuation]) -> int:
        return sum(identify_answers(answers, self._languages, self._classifier).in_language(self.target))

    def _continue(self, prompts: Sequence[str], seed: int) -> list[Continuation]:
        return generate(self._loaded, prompts, self._new_tokens, self._temperature, seed)


def third_languages(corpus: Corpus, source: str, target: str) -> tuple[str, ...]:
    """The corpus's languages other than source and target.

    Raises:
        UsageError: source and target are equal or not in the corpus, or there is no third language.
    """
    corpus.require(source, target)
    if source == target:
        raise UsageError(f"source and target are both {source!r}")
    third = tuple(name for name in corpus.languages if name not in (source, target))
    if not third:
        raise UsageError(
            "the corpus has no language beside source and target, so harm cannot be measured: add text in a third one"
        )
    return third
