"""Effectiveness and entanglement of a steering method, in the terms of SteeringControl (arXiv 2509.13450).

y is the rate of answers in the wanted language that are not failures, in [0, 1], for the base and the steered model:

    effectiveness = (y_target - y_target,base) / (1 - y_target,base)
    entanglement  = sqrt( mean over languages k of (y_k - y_k,base)^2 )

y_target is measured on prompts in the source language, with the target wanted.  y_k is measured on prompts in every
language k but the source, with k itself wanted.  Effectiveness is the fraction of the possible gain that was
achieved; it is negative if steering lowers the rate.  Entanglement is 0 if no other language changes.
The paper's behaviours are answers of data sets.  These definitions are Broca's, for languages, and not checked
against the paper's own formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping


def effectiveness(steered: float, base: float) -> float | None:
    """The fraction of the possible gain that was achieved; None if no gain was possible."""
    return (steered - base) / (1 - base) if base < 1 else None


def entanglement(steered: Mapping[str, float], base: Mapping[str, float]) -> float | None:
    """The root mean square of the other languages' changes; None without other languages."""
    if not steered:
        return None
    return math.sqrt(sum((rate - base[language]) ** 2 for language, rate in steered.items()) / len(steered))
