"""A trial of a search, and the goals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from neurons.files.json_file import Figure

NOTHING_WRITTEN = 10.0  # fluency gap of an edit that writes nothing
MEASURED, HOPELESS, NOTHING, REFUSED = "measured", "hopeless", "changes nothing", "refused"
WITHOUT_PLAN = (NOTHING, REFUSED)


@dataclass(frozen=True)
class Goals:
    """The goals of an edit.

    Attributes:
        share: minimum target-language rate, as a fraction of the ceiling.
        fluency_gap: maximum, nats a token.
        rise: maximum NLL rise of a third language, nats a token.
    """

    share: float = 0.95
    fluency_gap: float = 0.3
    rise: float = 0.05


@dataclass(frozen=True)
class Trial:
    """One edit that was tried.

    Attributes:
        number: from 0, in the order in which they were tried.
        method: one of ``editing.study.registry.searched``.
        settings: of the method.
        state: MEASURED, HOPELESS, NOTHING or REFUSED (by the method, for this model or text).
        found: number of continuations in the target.
        continuations: number of continuations; of a hopeless trial, those of the first few prompts.
        prompts: number of different prompts.
        fluency_gap: nats a token; None if not measured.
        nll_rise, kl: third language -> nats; empty if not measured.
        why: the reason of another state than MEASURED, in words.
    """

    number: int
    method: str
    settings: Mapping[str, Any]
    state: str
    found: int = 0
    continuations: int = 0
    prompts: int = 0
    fluency_gap: float | None = None
    nll_rise: Mapping[str, Figure] = field(default_factory=dict)
    kl: Mapping[str, Figure] = field(default_factory=dict)
    why: str = ""

    @property
    def share(self) -> float:
        """The target-language rate."""
        return self.found / self.continuations if self.continuations else 0.0

    @property
    def share_error(self) -> float:
        """Standard error of the rate over prompts, with one more failure added.

        Continuations of the same prompt are correlated, so they count as one; this overestimates the error.
        """
        if not self.prompts:
            return 1.0
        rate = self.share * self.prompts / (self.prompts + 1)
        return math.sqrt(rate * (1 - rate) / self.prompts)

    @property
    def rise(self) -> float:
        """The largest NLL rise of a third language, nats a token; 0 if not measured."""
        return max(self.nll_rise.values(), default=0.0)

    @property
    def harm(self) -> float:
        """The mean KL on third languages, nats; 0 if not measured."""
        return sum(self.kl.values()) / len(self.kl) if self.kl else 0.0

    def gap(self) -> float:
        """The fluency gap as a finite number: NOTHING_WRITTEN if there is none."""
        gap = self.fluency_gap
        return NOTHING_WRITTEN if gap is None or math.isnan(gap) else gap

    def misses(self, goals: Goals, ceiling: float) -> dict[str, float]:
        """Goal -> by what fraction of the goal it is missed; 0 or below if it is met."""
        rate = goals.share * ceiling
        missed = {"share": (rate - self.share) / rate}
        if self.state == MEASURED:
            missed["fluency gap"] = (self.gap() - goals.fluency_gap) / goals.fluency_gap
        if self.nll_rise:
            missed["rise"] = (self.rise - goals.rise) / goals.rise
        return missed

    def meets(self, goals: Goals, ceiling: float) -> bool:
        """Whether it was measured in full and meets all goals."""
        return self.state == MEASURED and all(miss <= 0 for miss in self.misses(goals, ceiling).values())
