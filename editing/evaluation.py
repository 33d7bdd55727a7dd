"""Does it steer, does it still write well, and what else changed: every figure beside the unedited model.

* **share**: continuations of source-language prompts identified as the target, or as the source.
* **ceiling**: the share of the target among the unedited model's own continuations of target prompts.
* **fluency gap**: mean negative log-likelihood a token (nats) of the steered continuations, read without
  their prompts by the unedited model, minus that of the unedited model's continuations of target
  prompts.  0: as fluent as the model ever is in that language; above 1: word salad.
* **distinct**: mean share of distinct words in a continuation.
* **NLL rise**: of held-out text in each language, nats a token, steered minus unedited.
* **KL**: of next-token distributions, unedited to steered, on the text of each language but source and target.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

from editing.generation import NEW_TOKENS, TEMPERATURE, Continuation, generate
from editing.language_id import check_languages, identify_language
from editing.likelihood import Steering, continuation_nll, mean_kl, nll_by_language
from editing.text import distinct_share, opening
from neurons.batches import language_batches
from neurons.corpus import Corpus
from neurons.errors import UsageError
from neurons.source import LoadedModel

SAMPLES_SHOWN = 5


@dataclass(frozen=True)
class Outcome:
    """One way of steering, measured.

    Attributes:
        name: of the way.
        target_share, source_share: of the continuations.
        distinct: mean share of distinct words in a continuation.
        fluency_gap: nats a token; NaN where nothing was written.
        nll: language -> nats a token, steered.
        nll_rise: language -> nats a token, steered minus unedited.
        kl: third language -> nats a position; empty where it was not asked for.
        languages_found: label -> number of continuations.
        samples: the first few {"prompt", "continuation", "language"}.
        details: what else is known of it: settings, components edited, ||dW||/||W||.
    """

    name: str
    target_share: float
    source_share: float
    distinct: float
    fluency_gap: float
    nll: dict[str, float]
    nll_rise: dict[str, float]
    kl: dict[str, float]
    languages_found: dict[str, int]
    samples: tuple[dict[str, str], ...]
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Evaluation:
    """Measures ways of steering one model from a source to a target language on one corpus.

    Args:
        loaded: the unedited model.
        corpus: held-out text; its lines' openings are the prompts.
        source: language of the prompts.
        target: language that the answers are to be in.
        samples: continuations a prompt.
        most_prompts: at most so many prompts.
        seed: of the sampling.

    Attributes:
        ceiling: share of the target among the unedited model's continuations of target prompts.
        base: the unedited model's Outcome.

    Raises:
        UsageError: a language that the corpus lacks or the identifier does not know.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        corpus: Corpus,
        source: str,
        target: str,
        samples: int = 1,
        most_prompts: int | None = None,
        seed: int = 0,
        new_tokens: int = NEW_TOKENS,
        temperature: float = TEMPERATURE,
    ) -> None:
        for language in (source, target):
            if language not in corpus.languages:
                raise UsageError(
                    f"the corpus has no language {language!r}: it has {', '.join(corpus.languages)}"
                )
        if source == target:
            raise UsageError(f"source and target are both {source!r}")
        check_languages(corpus.languages)
        self._loaded, self._corpus = loaded, corpus
        self.source, self.target = source, target
        self._seed, self._new_tokens, self._temperature = seed, new_tokens, temperature
        self._prompts = {
            language: [opening(text) for text in corpus.non_empty(language)[:most_prompts]] * samples
            for language in (source, target)
        }
        self._batches = language_batches(loaded, corpus)
        own = self._continue(target)
        labels = [identify_language(item.text, corpus.languages) for item in own]
        self.ceiling = labels.count(target) / len(labels)
        self._own_nll = continuation_nll(loaded, own)
        self._base_nll = nll_by_language(loaded, self._batches)
        self.base = self.measure("base", nullcontext)

    @property
    def continuations(self) -> int:
        """Number of continuations that each share is over."""
        return len(self._prompts[self.source])

    def measure(
        self, name: str, steering: Steering, details: dict[str, Any] | None = None, kl: bool = False
    ) -> Outcome:
        """Measure the model while ``steering()`` is entered.

        Args:
            name: for the Outcome.
            steering: makes a context in which the model is steered; entered several times.
            details: kept in the Outcome.
            kl: measure KL too.
        """
        with steering():
            answers = self._continue(self.source)
            nll = nll_by_language(self._loaded, self._batches)
        labels = [identify_language(item.text, self._corpus.languages) for item in answers]
        found = {label: labels.count(label) for label in sorted(set(labels))}
        return Outcome(
            name=name,
            target_share=labels.count(self.target) / len(labels),
            source_share=labels.count(self.source) / len(labels),
            distinct=sum(distinct_share(item.text) for item in answers) / len(answers),
            fluency_gap=continuation_nll(self._loaded, answers) - self._own_nll,
            nll=nll,
            nll_rise={language: value - self._base_nll[language] for language, value in nll.items()},
            kl=self._kl(steering) if kl else {},
            languages_found=found,
            samples=tuple(
                {"prompt": prompt, "continuation": item.text, "language": label}
                for prompt, item, label in zip(
                    self._prompts[self.source][:SAMPLES_SHOWN], answers, labels, strict=False
                )
            ),
            details=details or {},
        )

    def _continue(self, language: str) -> list[Continuation]:
        return generate(
            self._loaded, self._prompts[language], self._new_tokens, self._temperature, self._seed
        )

    def _kl(self, steering: Steering) -> dict[str, float]:
        third = [k for k in self._corpus.languages if k not in (self.source, self.target)]
        return {language: mean_kl(self._loaded, self._batches[language], steering) for language in third}
