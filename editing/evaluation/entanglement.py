"""What is reached, and what else moves: two numbers in the terms of SteeringControl (arXiv 2509.13450).

With y the share of answers that are in the language that is wanted and no failure, base and steered, all in
[0, 1]:

    effectiveness = (y_target - y_target,base) / (1 - y_target,base)
    entanglement  = sqrt( mean over languages k of (y_k - y_k,base)^2 )

y_target is taken on prompts of the source language, where the target is wanted; y_k on prompts of every
language k but the source, where k itself is wanted, steered or not.  Effectiveness is the part of the way
that was possible, and below 0 where steering takes away; entanglement is 0 where no other language moves.
The paper's behaviours are answers of data sets.  These definitions are Broca's, for languages, and not checked
against the paper's own formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping


def effectiveness(steered: float, base: float) -> float | None:
    """The share of the possible gain that was reached; None where there was nothing to gain."""
    return (steered - base) / (1 - base) if base < 1 else None


def entanglement(steered: Mapping[str, float], base: Mapping[str, float]) -> float | None:
    """The root mean square of the other languages' changes; None without other languages."""
    if not steered:
        return None
    return math.sqrt(sum((value - base[language]) ** 2 for language, value in steered.items()) / len(steered))
