"""The base class of scorers: a frozen dataclass of settings, required moments and a scoring function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from neurons.scorers.scores import Scores
from neurons.scorers.selection import Selection
from neurons.setting import Configured
from neurons.statistics.statistics import Statistics

# The input of a scorer: text packed into full blocks, one text a row, prompts with answers, points where an answer changes
# its language, or losses of texts without some heads.
PACKED, TEXTS, PROMPTS, CONFUSIONS, ABLATIONS = "blocks", "texts", "prompts", "confusions", "ablations"
NOTHING = "nothing"
RESPONSES = "mlp_in:responses"


@dataclass(frozen=True)
class Scorer(Configured):
    """Class attributes that every scorer declares; the dataclass fields are its settings.

    Attributes:
        name: the value of ``--method``.
        line: a description in one line.
        source: the publication.
        moments: statistics that must be recorded.
        reads: "blocks" (full blocks of joined text), "texts" (one text a row), "prompts" (with answers), "confusions"
            (points where an answer changes its language), "ablations" (losses without some heads) or "nothing".
        unit: what is scored, "neuron" or "head".
        selection: the default selection of neurons.
        control: whether it is a random control of another neuron set and gives no scores.
        rate_in_score: whether the scorer applies the top rate itself, so that selection keeps all members.
        parallel: whether line i must be the same text in every language.
    """

    name: ClassVar[str]
    line: ClassVar[str]
    source: ClassVar[str]
    moments: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[str] = PACKED
    unit: ClassVar[str] = "neuron"
    selection: ClassVar[Selection] = Selection(scope="language", top_rate=0.01)
    control: ClassVar[bool] = False
    rate_in_score: ClassVar[bool] = False
    parallel: ClassVar[bool] = False

    @classmethod
    def records(cls) -> bool:
        """Whether its moments are recorded from text."""
        return cls.reads in (PACKED, TEXTS)

    @classmethod
    def needs(cls) -> str:
        """The options that ``broca identify`` requires for it; optional ones in brackets."""
        if cls.reads == NOTHING:
            return "--like, or MODEL --languages"
        if cls.control:
            return "--like, and --statistics or MODEL --corpus"
        if cls.reads == PROMPTS:
            control = " --control [--recognition]" if "mlp_act:answer_control" in cls.moments else ""
            return f"MODEL --prompts{control}"
        if cls.reads == CONFUSIONS:
            return "MODEL --prompts or --answers [--sibling]"
        if cls.reads == ABLATIONS:
            return "MODEL --corpus"
        return f"MODEL --corpus, or --statistics{'; parallel text' if cls.parallel else ''}"

    def scores(self, statistics: Statistics, top_rate: float) -> Scores:
        """Score every neuron.

        Raises:
            UsageError: the statistics lack a moment that it needs.
        """
        raise NotImplementedError


def answers(statistics: Statistics, moment: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A moment summed over answers, and its number of prompts in each language."""
    return statistics.moment(moment), statistics.prompts[moment.partition(":")[2]]
