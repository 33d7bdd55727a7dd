"""Means: what recording hands to a scorer, turned into means, and what every scorer refuses alike."""

from __future__ import annotations

import torch

from neurons.errors import BrocaError, UsageError


def means(sums: torch.Tensor, counted: torch.Tensor, unit: str = "tokens") -> torch.Tensor:
    """Sums divided by how many they were summed over, float64 [L, I, K]; 0 where that is none.

    Args:
        sums: int64 or float64 [L, I, K].
        counted: int64, broadcasting against ``sums``: [K], or [L, I, K] where experts see some tokens only.
        unit: what was counted, for the error.

    Raises:
        UsageError: a language without anything counted.
        BrocaError: a sum that is not finite.
    """
    empty = counted.broadcast_to(sums.shape).amax((0, 1)) <= 0
    if bool(empty.any()):
        raise UsageError(
            f"language number {int(empty.nonzero()[0]) + 1} is without {unit}: give it some, or leave it out"
        )
    require_finite(sums)
    return torch.where(counted > 0, sums.double() / counted.double(), 0.0)


def require_finite(values: torch.Tensor) -> None:
    """Refuse values [L, I, K] that hold NaN or infinity: comparisons would hide them.

    Raises:
        BrocaError: which neuron it is.
    """
    wrong = ~torch.isfinite(values)
    if bool(wrong.any()):
        layer, neuron, _ = wrong.nonzero()[0].tolist()
        raise BrocaError(
            f"what was recorded of neuron {neuron} in layer {layer} is not finite: "
            "record again, in float32 if that was float16, from weights that are finite"
        )


def require_several(languages: int, method: str) -> None:
    """Refuse one language.

    Raises:
        UsageError: fewer than two.
    """
    if languages < 2:
        raise UsageError(f"{method} compares languages: it needs at least two")


def require_rate(name: str, rate: float) -> None:
    """Refuse what is no rate.

    Raises:
        UsageError: ``rate`` is outside (0, 1].
    """
    if not 0 < rate <= 1:
        raise UsageError(f"the {name} is {rate}, but a rate lies in (0, 1]")


def rate_count(name: str, rate: float, of: int) -> int:
    """round(rate * of).

    Raises:
        UsageError: ``rate`` is outside (0, 1], or so small that nothing is left.
    """
    require_rate(name, rate)
    count = round(rate * of)
    if count == 0:
        raise UsageError(f"the {name} {rate} of {of} neurons is none: raise it to {1 / of:.2g} or more")
    return count
