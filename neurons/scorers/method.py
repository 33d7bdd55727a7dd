"""A scorer as a method: a frozen dataclass of its settings that says what must be recorded and scores it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from neurons.scorers.scores import Scores
from neurons.scorers.selection import Selection
from neurons.scorers.setting import Configured
from neurons.statistics.statistics import Statistics

# What a method reads: text in full blocks, a text a row, prompts with answers.
PACKED, TEXTS, PROMPTS, NOTHING = "blocks", "texts", "prompts", "nothing"
RESPONSES = "mlp_in:responses"


@dataclass(frozen=True)
class Scorer(Configured):
    """What every method declares; its fields are its settings.

    Attributes:
        name: on the command line.
        line: what it is, in a line.
        source: where it was published.
        moments: what must be recorded.
        reads: "blocks" (full blocks of joined text), "texts" (a text a row), "prompts" (with answers) or
            "nothing".
        selection: how neurons are chosen where nothing else is asked for.
        control: whether it follows another set and scores nothing.
        rate_in_score: whether the top rate is the scorer's business and selection takes all its members.
        parallel: whether line i must be the same text in every language.
    """

    name: ClassVar[str]
    line: ClassVar[str]
    source: ClassVar[str]
    moments: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[str] = PACKED
    selection: ClassVar[Selection] = Selection(scope="language", top_rate=0.01)
    control: ClassVar[bool] = False
    rate_in_score: ClassVar[bool] = False
    parallel: ClassVar[bool] = False

    @classmethod
    def needs(cls) -> str:
        """What ``broca identify`` must be given, as options; in brackets what it may."""
        if cls.reads == NOTHING:
            return "--like, or MODEL --languages"
        if cls.control:
            return "--like, and --statistics or MODEL --corpus"
        if cls.reads == PROMPTS:
            control = " --control [--recognition]" if "mlp_act:answer_control" in cls.moments else ""
            return f"MODEL --prompts{control}"
        return f"MODEL --corpus, or --statistics{'; parallel text' if cls.parallel else ''}"

    def scores(self, statistics: Statistics, top_rate: float) -> Scores:
        """Score every neuron.

        Raises:
            UsageError: statistics that lack what it needs.
        """
        raise NotImplementedError


def answers(statistics: Statistics, moment: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A moment of answers, and the prompts of each language that it is of."""
    return statistics.moment(moment), statistics.prompts[moment.partition(":")[2]]
