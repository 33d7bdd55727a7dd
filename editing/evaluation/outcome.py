"""The figures of one way of steering, as ``editing.evaluation.evaluation`` defines and measures them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from neurons.files.json_file import Figure


@dataclass(frozen=True)
class Sample:
    """A prompt, what was written after it, and the language that this is identified as."""

    prompt: str
    continuation: str
    language: str

    @property
    def line(self) -> str:
        """What was written, on one line."""
        return " ".join(self.continuation.split())


@dataclass(frozen=True)
class OtherLanguage:
    """Answers to prompts of a language that is neither source nor prompted for.

    Attributes:
        share: of the answers that are in the prompts' language.
        ceiling: the same share of the unedited model's.
        fluency_gap: nats a token; None where nothing was written.
        distinct_pairs, longest_repeat, answer_words: as those of ``Outcome``.
    """

    share: Figure
    ceiling: Figure
    fluency_gap: float | None
    distinct_pairs: Figure
    longest_repeat: Figure
    answer_words: Figure


@dataclass(frozen=True)
class Outcome:
    """One way of steering, measured.  NaN: not measured.

    Attributes:
        name: of the way.
        target_share, source_share: of the answers; failures count to neither.
        distinct: mean share of distinct words in an answer.
        fluency_gap: nats a token; NaN where nothing was written.
        nll: language -> nats a token, steered.
        nll_rise: language -> nats a token, steered minus unedited.
        kl: third language -> nats a position; empty where it was not asked for.
        languages_found: label -> number of answers, failures by their label too.
        samples: the first few.
        details: what else is known of it: settings, components edited, ||dW||/||W||.
        failures: "empty" and "looping" -> number of answers.
        agreement: share of answers of which the second detector says the same.
        sentence_share: mean share of an answer's sentences that are in the target.
        distinct_pairs: mean distinct-2.
        longest_repeat: mean share of an answer's words in the longest passage that it repeats.
        answer_words: mean number of words.
        relevance: "scorer", "mean", "steering_score", "item_score"; empty without a scorer.
        others: language -> figures of the answers to its prompts; empty where they were not asked for.
        effectiveness, entanglement: None where ``others`` were not asked for, or nothing was to be gained.
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
    """A setting that was not measured.

    Attributes:
        name: of the way.
        settings: as those of a candidate.
        refused: why, in words.
    """

    name: str
    settings: Mapping[str, Any]
    refused: str
