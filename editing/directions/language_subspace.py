"""Language subspace: where the languages' means lie beside each other (arXiv 2505.15257).

With M [d, K] the means of K languages at one site of one layer and M_c = M - mean over languages,

    M_c = U diag(s) V^T,   B = U[:, :K-1]                 orthonormal, the strongest first

The paper steers with it, h' = h - lambda B B^T h: it removes what tells languages apart in the middle layers
(lambda > 0) and gives it back in the top ones (lambda < 0).

The vector is DiffMean inside the subspace, v = B B^T delta (``editing.directions.length``).  At the full rank
K - 1 every difference of two languages' means lies in it, so v is DiffMean itself, and the method's own is
the subspace; a lower rank keeps what most languages differ in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from editing.directions.length import into
from editing.directions.method import DirectionMethod
from editing.directions.texts import Found, Texts
from neurons.errors import BrocaError, UsageError
from neurons.scorers.setting import setting


@dataclass(frozen=True)
class LanguageSubspace:
    """The subspace of one layer.

    Attributes:
        basis: float64 [d, r], orthonormal columns; each one's largest coordinate is positive.
        explained: its share of the squared distances of the languages' means from their centre.
    """

    basis: torch.Tensor
    explained: float


def language_subspace(means: torch.Tensor, rank: int | None = None) -> LanguageSubspace:
    """The subspace of the languages' means [K, d].

    Args:
        means: float64, a language a row.
        rank: 1 to K - 1; None takes K - 1, or fewer where the means span less.

    Raises:
        UsageError: a rank outside 1 to K - 1.
        BrocaError: all means are the same.
    """
    most = len(means) - 1
    if rank is not None and not 1 <= rank <= most:
        raise UsageError(f"rank {rank}: {len(means)} languages span a subspace of rank 1 to {most}")
    centred = (means - means.mean(0)).double()
    _, values, right = torch.linalg.svd(centred, full_matrices=False)
    if not values.any():
        raise BrocaError("the languages do not differ: their means are the same")
    spanned = int((values > float(values[0]) * max(centred.shape) * torch.finfo(torch.float64).eps).sum())
    basis = right[: min(most if rank is None else rank, spanned)].T
    energy = values.square()
    return LanguageSubspace(
        basis=basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign(),
        explained=float(energy[: basis.shape[1]].sum() / energy.sum()),
    )


@dataclass(frozen=True)
class ByLanguageSubspace(DirectionMethod):
    """The method."""

    name = "language-subspace"
    line = "where the means of all languages of the corpus lie beside each other"
    source = "arXiv 2505.15257"
    needs = "text of all languages"
    all_languages = True

    rank: int | None = setting(None, "how many directions; as many as there are")

    def find(self, texts: Texts) -> Found:
        found = language_subspace(texts.means, self.rank)
        return Found(
            into(found.basis, texts.diffmean),
            found.basis,
            {"rank": found.basis.shape[1], "explained": found.explained},
        )
