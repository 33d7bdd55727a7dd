"""One edit that a search tried, and what it is to reach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from neurons.files.json_file import Figure

NOTHING_WRITTEN = 10.0  # a fluency gap for an edit that writes nothing
MEASURED, HOPELESS, NOTHING = "measured", "hopeless", "changes nothing"


@dataclass(frozen=True)
class Goals:
    """What an edit is to reach.

    Attributes:
        share: of the ceiling, at least.
        fluency_gap: nats a token, at most.
        rise: of a third language's NLL, nats a token, at most.
    """

    share: float = 0.95
    fluency_gap: float = 0.3
    rise: float = 0.05


@dataclass(frozen=True)
class Trial:
    """One edit that was tried.

    Attributes:
        number: in the order in which they were tried.
        method: of ``editing.study.registry.searched``.
        settings: of the method.
        state: MEASURED, HOPELESS or NOTHING.
        found, continuations: in the target, of how many; of the first few prompts where it is hopeless.
        prompts: how many different ones were continued.
        fluency_gap: nats a token; None where it was not measured.
        nll_rise, kl: third language -> nats; empty where they were not measured.
        why: it is hopeless, in words.
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
        return self.found / self.continuations if self.continuations else 0.0

    @property
    def share_error(self) -> float:
        """Standard error of the share over prompts, as if one more had failed.

        A prompt's continuations are alike, so several of them count as one: the error is rather too large.
        """
        if not self.prompts:
            return 1.0
        share = self.share * self.prompts / (self.prompts + 1)
        return math.sqrt(share * (1 - share) / self.prompts)

    @property
    def rise(self) -> float:
        return max(self.nll_rise.values(), default=0.0)

    @property
    def harm(self) -> float:
        """The third languages' mean KL."""
        return sum(self.kl.values()) / len(self.kl) if self.kl else 0.0

    def gap(self) -> float:
        """The fluency gap as a number that can be compared."""
        gap = self.fluency_gap
        return NOTHING_WRITTEN if gap is None or math.isnan(gap) else gap

    def misses(self, goals: Goals, ceiling: float) -> dict[str, float]:
        """By how much of itself each goal is missed; 0 or below where it is met."""
        share = goals.share * ceiling
        found = {"share": (share - self.share) / share}
        if self.state == MEASURED:
            found["fluency gap"] = (self.gap() - goals.fluency_gap) / goals.fluency_gap
        if self.nll_rise:
            found["rise"] = (self.rise - goals.rise) / goals.rise
        return found

    def meets(self, goals: Goals, ceiling: float) -> bool:
        return self.state == MEASURED and all(miss <= 0 for miss in self.misses(goals, ceiling).values())
