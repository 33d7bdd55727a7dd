"""Language subspace: the span of the differences of the languages' means (arXiv 2505.15257).

With M [d, K] the means of K languages at one site of one layer and M_c = M - mean over languages,

    M_c = U diag(s) V^T,   B = U[:, :K-1]                 orthonormal, by descending s

The paper steers with it, h' = h - lambda B B^T h: it removes language information in the middle layers
(lambda > 0) and adds it back in the top ones (lambda < 0).

The vector is DiffMean projected into the subspace, v = B B^T delta (``editing.directions.length``).  At full rank
K - 1 the subspace contains every difference of two languages' means, so v is DiffMean; a lower rank keeps the
dimensions in which most languages differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from editing.directions.length import into
from editing.directions.method import DirectionMethod
from editing.directions.texts import Estimate, Texts
from neurons.errors import BrocaError, UsageError
from neurons.setting import setting


def language_subspace(means: torch.Tensor, rank: int | None = None) -> tuple[torch.Tensor, float]:
    """The subspace of the languages' means [K, d].

    Args:
        means: float64, one language a row.
        rank: 1 to K - 1; None takes K - 1, or less if the means span less.

    Returns:
        Its basis, float64 [d, r], orthonormal columns, each with a positive largest coordinate, and its fraction of the
        squared distances of the languages' means from their centre.

    Raises:
        UsageError: a rank outside 1 to K - 1.
        BrocaError: all means are equal.
    """
    max_rank = len(means) - 1
    if rank is not None and not 1 <= rank <= max_rank:
        raise UsageError(f"rank {rank}: {len(means)} languages span a subspace of rank 1 to {max_rank}")
    centred = (means - means.mean(0)).double()
    _, values, right = torch.linalg.svd(centred, full_matrices=False)
    if not values.any():
        raise BrocaError("the languages do not differ: their means are the same")
    spanned = int((values > float(values[0]) * max(centred.shape) * torch.finfo(torch.float64).eps).sum())
    basis = right[: min(max_rank if rank is None else rank, spanned)].T
    energy = values.square()
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    return basis * signs, float(energy[: basis.shape[1]].sum() / energy.sum())


@dataclass(frozen=True)
class ByLanguageSubspace(DirectionMethod):
    """The registered method."""

    name = "language-subspace"
    line = "the span of the differences of all languages' means"
    source = "arXiv 2505.15257"
    needs = "text of all languages"
    all_languages = True

    rank: int | None = setting(None, "dimensions of the subspace; by default all")

    def estimate(self, texts: Texts) -> Estimate:
        basis, explained = language_subspace(texts.means, self.rank)
        measures = {"rank": basis.shape[1], "explained": explained}
        return Estimate(into(basis, texts.diffmean), basis, measures)
