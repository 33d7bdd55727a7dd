"""An affine map of neurons' activations, and the constant that a gated MLP can represent of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Arithmetic:
    """s <- scale * s + offset for every neuron of a layer.

    Attributes:
        scale: float64 [I], c, 0 or 1.
        offset: float64 [I], a.
    """

    scale: torch.Tensor
    offset: torch.Tensor


def mean_shift(
    values: torch.Tensor, offset: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """(v [d], constant fraction) of the neurons with an offset.

    Args:
        values: [d, S], their columns of W.
        offset: [S], a.
        mean: [S], mean of u.
        covariance: [S, S], covariance of u.
    """
    scaled = values.double() * offset
    shift = scaled @ mean
    constant = float(shift.square().sum())
    variance = float(((scaled @ covariance) * scaled).sum())
    return shift, constant / (constant + variance) if constant > 0 else 0.0
