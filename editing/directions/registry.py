"""The registry of direction methods.  To add one, write its file and list its class here."""

from __future__ import annotations

from editing.directions.bipo import Bipo
from editing.directions.diffmean import DiffMean
from editing.directions.grains import Grains
from editing.directions.language_subspace import ByLanguageSubspace
from editing.directions.lda import Lda
from editing.directions.low_rank_shift import ByLowRankShift
from editing.directions.method import DirectionMethod
from editing.directions.pca import Pca
from editing.directions.probe import Probe
from editing.directions.sae import Sae
from editing.directions.sae_shift import SaeShift
from neurons.errors import UsageError

METHODS: dict[str, type[DirectionMethod]] = {
    method.name: method
    for method in (DiffMean, Pca, Lda, Probe, ByLowRankShift, ByLanguageSubspace, Sae, SaeShift, Bipo, Grains)
}


def method_of(name: str) -> type[DirectionMethod]:
    """
    Raises:
        UsageError: no such method.
    """
    if name not in METHODS:
        raise UsageError(f"method {name!r} is unknown: choose from {', '.join(METHODS)}")
    return METHODS[name]
