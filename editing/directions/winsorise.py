"""Winsorising: clip each coordinate of the texts' means to a quantile range before averaging.

With q in (0.5, 1], for coordinate i over the n texts of one language at one site of one layer,

    x_i <- min(max(x_i, Q_i(1 - q)), Q_i(q))              Q_i: quantile, linear between order statistics

so that a few texts with huge activations do not dominate the direction.  q = 1 does not clip.
"""

from __future__ import annotations

import numpy
import torch

from neurons.errors import UsageError


def winsorise(values: torch.Tensor, quantile: float) -> torch.Tensor:
    """Clip each column of [n, d] to its range from quantile 1 - q to q.

    Raises:
        UsageError: a quantile outside (0.5, 1].
    """
    require_quantile(quantile)
    low, high = numpy.quantile(values.numpy(), [1 - quantile, quantile], axis=0)
    return values.clamp(torch.from_numpy(low), torch.from_numpy(high))


def require_quantile(quantile: float) -> None:
    """
    Raises:
        UsageError: the quantile is outside (0.5, 1].
    """
    if not 0.5 < quantile <= 1:
        raise UsageError(
            f"the winsorising quantile is {quantile}, but it must lie in (0.5, 1], for example 0.995"
        )
