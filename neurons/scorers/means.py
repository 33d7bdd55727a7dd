"""Means of recorded sums, and checks that scorers share."""

from __future__ import annotations

import torch

from neurons.errors import BrocaError, UsageError


def means(sums: torch.Tensor, counted: torch.Tensor, unit: str = "tokens") -> torch.Tensor:
    """Sums divided by their counts, float64 [L, I, K]; 0 where the count is 0.

    Args:
        sums: int64 or float64 [L, I, K].
        counted: int64, broadcasting against ``sums``: [K], or [L, I, K] where experts see only some tokens.
        unit: what was counted, for the error message.

    Raises:
        UsageError: a language with a count of 0.
        BrocaError: a sum that is not finite.
    """
    empty = counted.broadcast_to(sums.shape).amax((0, 1)) <= 0
    if bool(empty.any()):
        raise UsageError(
            f"language number {int(empty.nonzero()[0]) + 1} has no {unit}: give it some, or leave it out"
        )
    require_finite(sums)
    return torch.where(counted > 0, sums.double() / counted.double(), 0.0)


def require_finite(values: torch.Tensor) -> None:
    """Reject values [L, I, K] that hold NaN or infinity: comparisons would hide them.

    Raises:
        BrocaError: names the neuron.
    """
    wrong = ~torch.isfinite(values)
    if bool(wrong.any()):
        layer, neuron, _ = wrong.nonzero()[0].tolist()
        raise BrocaError(
            f"the statistics of neuron {neuron} in layer {layer} are not finite: "
            "record again with finite weights, in float32 if it was float16"
        )


def require_several(languages: int, method: str) -> None:
    """Reject a single language.

    Raises:
        UsageError: fewer than two.
    """
    if languages < 2:
        raise UsageError(f"{method} compares languages: it needs at least two")


def require_rate(name: str, rate: float) -> None:
    """Reject a rate outside (0, 1].

    Raises:
        UsageError: ``rate`` is outside (0, 1].
    """
    if not 0 < rate <= 1:
        raise UsageError(f"the {name} is {rate}, but it must lie in (0, 1]")


def rate_count(name: str, rate: float, of: int) -> int:
    """round(rate * of).

    Raises:
        UsageError: ``rate`` is outside (0, 1], or so small that the result is 0.
    """
    require_rate(name, rate)
    count = round(rate * of)
    if count == 0:
        raise UsageError(f"the {name} {rate} of {of} neurons is none: raise it to {1 / of:.2g} or more")
    return count
