"""PCA of paired differences: the line along which translations differ most (RepE, arXiv 2310.01405).

With D [n, d] the differences d_i = target_i - source_i of line-parallel texts' means, taken with both signs
as in RepE, so that the result does not depend on the order of languages, the mean is 0 and the first principal
component is the first right singular vector of the uncentred D:

    u = argmax_{||u|| = 1} sum_i (d_i . u)^2              explained = s_1^2 / sum_i s_i^2

Only a line is estimated: v = (u . delta) u with delta DiffMean (``editing.directions.length``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from editing.directions.length import along
from editing.directions.method import DirectionMethod
from editing.directions.texts import Estimate, Texts
from neurons.errors import BrocaError


def pca(differences: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The first principal component of paired differences [n, d].

    Returns:
        Its unit vector, float64 [d], whose largest coordinate is positive, and its fraction of the squared differences.

    Raises:
        BrocaError: all differences are 0.
    """
    _, values, right = torch.linalg.svd(differences.double(), full_matrices=False)
    energy = values.square()
    if not energy.sum() > 0:
        raise BrocaError("source and target do not differ: the differences of all texts are 0")
    unit = right[0]
    return unit * unit[unit.abs().argmax()].sign(), float(energy[0] / energy.sum())


@dataclass(frozen=True)
class Pca(DirectionMethod):
    """The registered method."""

    name = "pca"
    line = "the line along which translations differ most"
    source = "arXiv 2310.01405"
    needs = "parallel text"
    parallel = True

    def estimate(self, texts: Texts) -> Estimate:
        assert texts.differences is not None
        unit, explained = pca(texts.differences)
        return Estimate(along(unit, texts.diffmean), measures={"explained": explained})
