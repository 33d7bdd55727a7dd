"""What a trial of the search costs and brings: the figures of ``editing.evaluation.evaluation``, with all that does not
change from trial to trial computed once.

* **share**, **fluency gap** and **ceiling** as there, of continuations of source-language prompts.
* **harm**: the mean over third languages (neither source nor target) of KL(unedited || edited) of what is
  predicted for each token, nats.
* **rise**: the largest rise of the negative log-likelihood of a third language's text, nats a token.

The unedited model's final hidden states of the third languages' text are kept, so that a trial reads that text
once, through the edited model, for likelihood and KL together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from editing.evaluation.answers import identified
from editing.evaluation.generation import NEW_TOKENS, TEMPERATURE, Continuation, check_samples, generate
from editing.evaluation.language_id import check_languages
from editing.evaluation.likelihood import continuation_nll, read_again, read_unedited
from neurons.errors import BrocaError, UsageError
from neurons.models.source import LoadedModel
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus
from neurons.text.words import opening

LEAST_CEILING = 0.2  # as in editing.pipeline.run: below it, what an edit reaches cannot be told from noise


@dataclass(frozen=True)
class Harm:
    """What an edit does to languages that it is not about.

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

    @property
    def mean_kl(self) -> float:
        """The third languages' mean KL."""
        return sum(self.kl.values()) / len(self.kl)


@dataclass(frozen=True)
class Written:
    """What an edited model wrote.

    Attributes:
        found: continuations in the target that are no failures.
        continuations: how many there are.
        prompts: how many different prompts they continue.
        answers: all of them.
    """

    found: int
    continuations: int
    prompts: int
    answers: tuple[Continuation, ...]


class Scoring:
    """Measures edits of one model from a source to a target language on one part of a corpus.

    Args:
        loaded: the unedited model.
        corpus: text that the edits were not made from; its lines' openings are the prompts.
        source: language that is steered from.
        target: language that is steered to; every other language of the corpus is a third one.
        prompts: at most so many.
        samples: continuations a prompt.
        lines: of a third language's text, at most so many are read.
        seed: of the sampling, the same for every edit.

    Attributes:
        ceiling: share of the target among the unedited model's continuations of target prompts.

    Raises:
        UsageError: a language that the corpus lacks or the identifier does not know, no third language, or
            several samples at temperature 0.
        BrocaError: a model that hardly writes the target.
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
    ) -> None:
        check_samples(samples, temperature)
        self.source, self.target = source, target
        self.third = third_languages(corpus, source, target)
        check_languages(corpus.languages)
        self._loaded, self._languages = loaded, corpus.languages
        self._seed, self._new_tokens, self._temperature = seed, new_tokens, temperature
        openings = {
            language: [opening(text) for text in corpus.non_empty(language)[:prompts]]
            for language in (source, target)
        }
        self._few = openings[source]
        self._prompts = openings[source] * samples
        own = self._continue(openings[target] * samples, seed)
        self.ceiling = self._found(own) / len(own)
        if self.ceiling < LEAST_CEILING:
            raise BrocaError(
                f"the unedited model answers {target} prompts in {target} only {self.ceiling:.0%} of the time, so "
                "no edit can be told from another: choose another target, or a model that writes it"
            )
        self._own_nll = continuation_nll(loaded, own)
        some = replace(corpus, texts={k: tuple(corpus.non_empty(k)[:lines]) for k in self.third})
        self._texts = {
            name: read_unedited(loaded, items) for name, items in language_batches(loaded, some).items()
        }

    def few(self, prompts: int) -> tuple[int, int]:
        """(continuations in the target, continuations) of the first few prompts, as the model is now."""
        answers = self._continue(self._few[:prompts], self._seed)
        return self._found(answers), len(answers)

    def harm(self) -> Harm:
        """What the model, as it is now, makes of the third languages' text."""
        read = {language: read_again(self._loaded, text) for language, text in self._texts.items()}
        return Harm(
            {name: nll - self._texts[name].nll for name, (nll, _) in read.items()},
            {name: kl for name, (_, kl) in read.items()},
        )

    def written(self, seed: int | None = None) -> Written:
        """What the model, as it is now, writes; a seed in place of the search's own."""
        answers = self._continue(self._prompts, self._seed if seed is None else seed)
        return Written(self._found(answers), len(answers), len(self._few), tuple(answers))

    def fluency_gap(self, written: Written) -> float:
        """Of what an edited model wrote, read by the unedited one, which the model must be now."""
        return continuation_nll(self._loaded, written.answers) - self._own_nll

    def _found(self, answers: Sequence[Continuation]) -> int:
        return sum(identified(answers, self._languages).are(self.target))

    def _continue(self, prompts: Sequence[str], seed: int) -> list[Continuation]:
        return generate(self._loaded, prompts, self._new_tokens, self._temperature, seed)


def third_languages(corpus: Corpus, source: str, target: str) -> tuple[str, ...]:
    """The corpus's other languages.

    Raises:
        UsageError: source and target are the same or not there, or there is no third.
    """
    corpus.require(source, target)
    if source == target:
        raise UsageError(f"source and target are both {source!r}")
    third = tuple(name for name in corpus.languages if name not in (source, target))
    if not third:
        raise UsageError(
            "the corpus has no language beside source and target, so harm cannot be seen: give text of a third"
        )
    return third
