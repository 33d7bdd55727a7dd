"""The measures of one steering method, as ``editing.evaluation.evaluation`` defines them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from neurons.files.json_file import Figure


@dataclass(frozen=True)
class Sample:
    """A prompt, its continuation, and the language identified in the continuation."""

    prompt: str
    continuation: str
    language: str

    @property
    def line(self) -> str:
        """The continuation on one line."""
        return " ".join(self.continuation.split())


@dataclass(frozen=True)
class OtherLanguage:
    """Answers to prompts in a language other than the source, where the answers should be in that language.

    Attributes:
        share: rate of answers in the prompts' language.
        ceiling: the same rate for the unedited model.
        fluency_gap: nats a token; None if nothing was written.
        distinct_pairs, longest_repeat, answer_words: as in ``Outcome``.
    """

    share: Figure
    ceiling: Figure
    fluency_gap: float | None
    distinct_pairs: Figure
    longest_repeat: Figure
    answer_words: Figure


@dataclass(frozen=True)
class Outcome:
    """The measures of one method.  NaN: not measured.

    Attributes:
        name: title of the method.
        target_share, source_share: rates of answers in the target and the source language; failures count for neither.
        distinct: mean fraction of distinct words in an answer.
        fluency_gap: nats a token; NaN if nothing was written.
        nll: language -> nats a token, steered.
        nll_rise: language -> nats a token, steered minus unedited.
        kl: third language -> nats a position; empty if not measured.
        languages_found: label -> number of answers, failures included.
        samples: the first few prompts and answers.
        details: settings, components edited, ||dW||/||W||.
        failures: "empty" and "looping" -> number of answers; those without a letter are "empty" alone.
        agreement: fraction of answers that the second detector labels the same.
        sentence_share: mean fraction of an answer's sentences that are in the target.
        distinct_pairs: mean distinct-2.
        longest_repeat: mean fraction of an answer's words in its longest repeated passage.
        answer_words: mean number of words.
        relevance: "scorer", "mean", "steering_score", "item_score"; empty without a scorer.
        others: language -> measures of the answers to its prompts; empty if not measured.
        effectiveness, entanglement: None without ``others``, or if no gain was possible.
    """

    name: str
    target_share: Figure
    source_share: Figure
    distinct: Figure
    fluency_gap: Figure
    nll: Mapping[str, Figure]
    nll_rise: Mapping[str, Figure]
    kl: Mapping[str, Figure]
    languages_found: Mapping[str, int]
    samples: tuple[Sample, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    agreement: Figure = math.nan
    sentence_share: Figure = math.nan
    distinct_pairs: Figure = math.nan
    longest_repeat: Figure = math.nan
    answer_words: Figure = math.nan
    relevance: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, OtherLanguage] = field(default_factory=dict)
    effectiveness: float | None = None
    entanglement: float | None = None


@dataclass(frozen=True)
class Refused:
    """Settings that were not measured.

    Attributes:
        name: title of the method.
        settings: of the candidate.
        refused: the reason, in words.
    """

    name: str
    settings: Mapping[str, Any]
    refused: str
