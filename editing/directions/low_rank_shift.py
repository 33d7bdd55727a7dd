"""Low-rank shift: the few directions that a language shift takes (Neural FOXP2, arXiv 2602.00945).

With D [n, d] the differences target_i - source_i of line-parallel texts' means at one site of one layer, and
D = U diag(s) V^T its singular value decomposition, s descending:

    r_eff = ceil(exp(H(p))),  p_i = s_i^2 / sum s^2,  H(p) = -sum p ln p        effective rank
    r_gap = argmax_{i <= 12} s_i / s_{i+1}                                       the first of equals
    r     = max(1, min(r_eff, 12, r_gap))
    mass  = sum_{i <= r} s_i^2 / sum s^2
    stability = median over pairs (a, b) of 20 bootstraps of the pairs of tr(P_a P_b) / tr(P_a)

P_a projects on the first r right singular vectors of bootstrap a.  The window is the run of 3 to 6 layers
with the largest sum of mass * stability; no summand is negative, so the longest run that fits wins but for
ties, of which the shorter and then the earlier is taken.

The subspace is B = V[:, :r]; the vector is DiffMean inside it, v = B B^T delta
(``editing.directions.length``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from editing.directions.length import into
from editing.directions.method import DirectionMethod
from editing.directions.texts import Found, Texts
from neurons.errors import BrocaError
from neurons.scorers.setting import setting

MOST_RANK = 12
BOOTSTRAPS = 20
WINDOW = (3, 6)


@dataclass(frozen=True)
class LowRankShift:
    """The subspace of one layer.

    Attributes:
        basis: float64 [d, r], orthonormal columns, the strongest first; each one's largest coordinate is
            positive.
        effective_rank: r_eff.
        gap_rank: r_gap.
        mass: the subspace's share of the squared differences.
        stability: in [0, 1]: 1 where every resampling of the texts finds the same subspace.
    """

    basis: torch.Tensor
    effective_rank: int
    gap_rank: int
    mass: float
    stability: float

    @property
    def rank(self) -> int:
        return self.basis.shape[1]


def low_rank_shift(differences: torch.Tensor, seed: int = 0, bootstraps: int = BOOTSTRAPS) -> LowRankShift:
    """The subspace of paired differences [n, d].

    Args:
        differences: target minus source, a text a row.
        seed: of the bootstraps; the same seed draws the same texts at every layer.
        bootstraps: at least 2.

    Raises:
        BrocaError: all differences are 0.
    """
    left, values, right = torch.linalg.svd(differences.double(), full_matrices=False)
    if not values.any():
        raise BrocaError("source and target do not differ: the differences of all texts are 0")
    # What is left of exact zeros by rounding would make ratios of nothing.
    nothing = float(values[0]) * max(differences.shape) * torch.finfo(torch.float64).eps
    values = torch.where(values > nothing, values, 0.0)
    energy = values.square() / values.square().sum()
    # The rank of r equal values is r: rounding must not make it the next whole number.
    effective = math.ceil(float(torch.exp(-torch.xlogy(energy, energy).sum())) - 1e-9)
    gap = _gap_rank(values)
    rank = max(1, min(effective, MOST_RANK, gap))
    basis = right[:rank].T
    return LowRankShift(
        basis=basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign(),
        effective_rank=effective,
        gap_rank=gap,
        mass=float(energy[:rank].sum()),
        stability=_stability(left * values, rank, seed, bootstraps),
    )


def window(worth: Sequence[float], shortest: int = WINDOW[0], longest: int = WINDOW[1]) -> tuple[int, int]:
    """The run of layers with the largest sum.

    Args:
        worth: a number a layer, mass * stability.
        shortest: fewest layers of a run; a model with fewer is one run.
        longest: most layers.

    Returns:
        (first layer, last layer).
    """
    runs = [
        (first, first + length - 1)
        for length in range(min(shortest, len(worth)), min(longest, len(worth)) + 1)
        for first in range(len(worth) - length + 1)
    ]
    return max(runs, key=lambda run: math.fsum(worth[run[0] : run[1] + 1]))


def _gap_rank(values: torch.Tensor) -> int:
    """The first i (from 1) of the largest s_i / s_{i+1}; a fall to 0 is the largest that there is."""
    following = torch.cat([values[1:], values.new_zeros(1)]) if len(values) == 1 else values[1:]
    before = values[: len(following)]
    ratios = torch.where(before > 0, before / following, 0.0)[:MOST_RANK]
    return int(ratios.argmax()) + 1


def _stability(coordinates: torch.Tensor, rank: int, seed: int, bootstraps: int) -> float:
    """Median agreement of the bootstraps' subspaces.

    Args:
        coordinates: [n, k], the differences in an orthonormal basis of what they span: the subspaces'
            agreement does not depend on the basis, and k is at most the number of texts.
    """
    generator = torch.Generator().manual_seed(seed)
    count, width = coordinates.shape
    bases = torch.zeros(bootstraps, width, rank, dtype=torch.float64)
    for basis in bases:
        times = torch.bincount(torch.randint(count, (count,), generator=generator), minlength=count)
        second = (coordinates * times[:, None]).T @ coordinates
        values, vectors = torch.linalg.eigh(second)
        # Texts drawn several times may span less than the rank: what they do not span is no direction.
        spanned = values[-rank:] > float(values[-1]) * width * torch.finfo(torch.float64).eps
        basis.copy_(vectors[:, -rank:] * spanned)
    overlaps = torch.einsum("akr,bks->abrs", bases, bases).square().sum((-2, -1))
    agreement = overlaps / overlaps.diagonal()[:, None]  # tr(P_a P_a) = tr(P_a)
    pairs = torch.triu_indices(bootstraps, bootstraps, offset=1)
    return float(agreement[pairs[0], pairs[1]].quantile(0.5).clamp(max=1.0))


@dataclass(frozen=True)
class ByLowRankShift(DirectionMethod):
    """The method."""

    name = "low-rank-shift"
    line = "the few directions that the shift takes, as many as its spectrum says, and a window of layers"
    source = "arXiv 2602.00945"
    needs = "parallel text"
    parallel = True

    seed: int = setting(0, "of what is drawn")
    bootstraps: int = setting(BOOTSTRAPS, "draws that stability is told by")

    def find(self, texts: Texts) -> Found:
        assert texts.differences is not None
        found = low_rank_shift(texts.differences, seed=self.seed, bootstraps=self.bootstraps)
        names = ("rank", "effective_rank", "gap_rank", "mass", "stability")
        return Found(
            into(found.basis, texts.diffmean), found.basis, {name: getattr(found, name) for name in names}
        )
