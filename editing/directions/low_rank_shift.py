"""Low-rank shift: the few dimensions of the shift between languages (Neural FOXP2, arXiv 2602.00945).

With D [n, d] the differences target_i - source_i of line-parallel texts' means at one site of one layer, and
D = U diag(s) V^T its singular value decomposition, s descending:

    r_eff = ceil(exp(H(p))),  p_i = s_i^2 / sum s^2,  H(p) = -sum p ln p        effective rank
    r_gap = argmax_{i <= 12} s_i / s_{i+1}                                       the first maximum
    r     = max(1, min(r_eff, 12, r_gap))
    mass  = sum_{i <= r} s_i^2 / sum s^2
    stability = median over pairs (a, b) of 20 bootstraps of the pairs of tr(P_a P_b) / tr(P_a)

P_a projects on the first r right singular vectors of bootstrap a.  The window is the run of 3 to 6 layers
with the largest sum of mass * stability; no term is negative, so it is the longest run except for ties, which
the shorter and then the earlier run wins.

The subspace is B = V[:, :r]; the vector is DiffMean projected into it, v = B B^T delta
(``editing.directions.length``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from editing.directions.length import into
from editing.directions.method import DirectionMethod
from editing.directions.texts import Estimate, Texts
from neurons.errors import BrocaError, UsageError
from neurons.setting import setting

MAX_RANK = 12
BOOTSTRAPS = 20
WINDOW = (3, 6)


@dataclass(frozen=True)
class LowRankShift:
    """The subspace of one layer.

    Attributes:
        basis: float64 [d, r], orthonormal columns by descending s, each with a positive largest coordinate.
        effective_rank: r_eff.
        gap_rank: r_gap.
        mass: the subspace's fraction of the squared differences.
        stability: in [0, 1]; 1 if every bootstrap gives the same subspace.
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
        differences: target minus source, one text a row.
        seed: for the bootstraps; the same seed draws the same texts at every layer.
        bootstraps: at least 2.

    Raises:
        BrocaError: all differences are 0.
    """
    left, values, right = torch.linalg.svd(differences.double(), full_matrices=False)
    if not values.any():
        raise BrocaError("source and target do not differ: the differences of all texts are 0")
    # Singular values below rounding error would give meaningless ratios.
    rounding = float(values[0]) * max(differences.shape) * torch.finfo(torch.float64).eps
    values = torch.where(values > rounding, values, 0.0)
    energy = values.square() / values.square().sum()
    # r equal values have effective rank r: rounding must not raise it to the next integer.
    effective = math.ceil(float(torch.exp(-torch.xlogy(energy, energy).sum())) - 1e-9)
    gap = _gap_rank(values)
    rank = max(1, min(effective, MAX_RANK, gap))
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
        worth: mass * stability of each layer.
        shortest: minimum length of a run; a model with fewer layers is one run.
        longest: maximum length of a run.

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
    """The first i (from 1) with the largest s_i / s_{i+1}; a drop to 0 is the largest."""
    following = torch.cat([values[1:], values.new_zeros(1)]) if len(values) == 1 else values[1:]
    before = values[: len(following)]
    ratios = torch.where(before > 0, before / following, 0.0)[:MAX_RANK]
    return int(ratios.argmax()) + 1


def _stability(coordinates: torch.Tensor, rank: int, seed: int, bootstraps: int) -> float:
    """Median agreement of the bootstraps' subspaces.

    Args:
        coordinates: [n, k], the differences in an orthonormal basis of their span: the agreement does not
            depend on the basis, and k is at most the number of texts.
    """
    generator = torch.Generator().manual_seed(seed)
    count, width = coordinates.shape
    bases = torch.zeros(bootstraps, width, rank, dtype=torch.float64)
    for basis in bases:
        times = torch.bincount(torch.randint(count, (count,), generator=generator), minlength=count)
        moment = (coordinates * times[:, None]).T @ coordinates
        values, vectors = torch.linalg.eigh(moment)
        # A bootstrap may span fewer dimensions than the rank: zero the rest.
        spanned = values[-rank:] > float(values[-1]) * width * torch.finfo(torch.float64).eps
        basis.copy_(vectors[:, -rank:] * spanned)
    overlaps = torch.einsum("akr,bks->abrs", bases, bases).square().sum((-2, -1))
    agreement = overlaps / overlaps.diagonal()[:, None]  # tr(P_a P_a) = tr(P_a)
    pairs = torch.triu_indices(bootstraps, bootstraps, offset=1)
    return float(agreement[pairs[0], pairs[1]].quantile(0.5).clamp(max=1.0))


@dataclass(frozen=True)
class ByLowRankShift(DirectionMethod):
    """The registered method."""

    name = "low-rank-shift"
    line = "the subspace of the shift, with a rank from its spectrum, and a window of layers"
    source = "arXiv 2602.00945"
    needs = "parallel text"
    parallel = True

    seed: int = setting(0, "random seed")
    bootstraps: int = setting(BOOTSTRAPS, "bootstraps for the stability")

    def __post_init__(self) -> None:
        if self.bootstraps < 2:
            raise UsageError(f"{self.name} needs 2 bootstraps or more, not {self.bootstraps}")

    def estimate(self, texts: Texts) -> Estimate:
        assert texts.differences is not None
        shift = low_rank_shift(texts.differences, seed=self.seed, bootstraps=self.bootstraps)
        names = ("rank", "effective_rank", "gap_rank", "mass", "stability")
        return Estimate(
            into(shift.basis, texts.diffmean), shift.basis, {name: getattr(shift, name) for name in names}
        )
