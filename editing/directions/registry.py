"""The direction methods by name: what each needs, and what it finds at one site of one layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from editing.directions.language_subspace import language_subspace
from editing.directions.lda import lda
from editing.directions.length import along, into
from editing.directions.low_rank_shift import BOOTSTRAPS, low_rank_shift
from editing.directions.pca import pca
from editing.directions.probe import PENALTY, probe
from editing.directions.sae import RANDOM_RATE, TARGET_RATE
from editing.directions.texts import Found, Texts
from neurons.errors import UsageError

DIFFMEAN, SAE = "diffmean", "sae"

# (texts at one site of one layer, settings) -> the direction there
Finder = Callable[[Texts, Mapping[str, Any]], Found]


@dataclass(frozen=True)
class Method:
    """One way of taking a direction.

    Attributes:
        line: what it is, in a line.
        source: where it was published.
        needs: what it must be given.
        find: None for ``sae``, which reads the model's tokens through autoencoders.
        settings: name -> default.
        parallel: whether line i must be the same text in both languages.
        all_languages: whether it reads every language of the corpus and not the two alone.
    """

    line: str
    source: str
    needs: str
    find: Finder | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    parallel: bool = False
    all_languages: bool = False

    def with_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """All settings, those given in place of the defaults.

        Raises:
            UsageError: a setting that the method does not have, or one that should be a whole number.
        """
        unknown = sorted(set(settings) - set(self.settings))
        if unknown:
            known = ", ".join(self.settings) or "none"
            raise UsageError(f"setting {unknown[0]!r} is not one of this method's: it has {known}")
        chosen = {**self.settings, **settings}
        for name in ("rank", "seed", "bootstraps"):
            value = chosen.get(name)
            if value is not None and value != int(value):
                raise UsageError(f"setting {name} is {value}: it must be a whole number")
            if value is not None:
                chosen[name] = int(value)
        return chosen


def _diffmean(texts: Texts, settings: Mapping[str, Any]) -> Found:
    return Found(texts.diffmean)


def _pca(texts: Texts, settings: Mapping[str, Any]) -> Found:
    assert texts.differences is not None
    found = pca(texts.differences)
    return Found(along(found.unit, texts.diffmean), measures={"explained": found.explained})


def _lda(texts: Texts, settings: Mapping[str, Any]) -> Found:
    found = lda(texts.source, texts.target)
    return Found(along(found.unit, texts.diffmean), measures={"shrinkage": found.shrinkage})


def _probe(texts: Texts, settings: Mapping[str, Any]) -> Found:
    found = probe(texts.source, texts.target, **settings)
    return Found(along(found.unit, texts.diffmean), measures={"accuracy": found.accuracy})


def _low_rank_shift(texts: Texts, settings: Mapping[str, Any]) -> Found:
    assert texts.differences is not None
    found = low_rank_shift(texts.differences, **settings)
    return Found(
        into(found.basis, texts.diffmean),
        found.basis,
        {
            "rank": found.rank,
            "effective_rank": found.effective_rank,
            "gap_rank": found.gap_rank,
            "mass": found.mass,
            "stability": found.stability,
        },
    )


def _language_subspace(texts: Texts, settings: Mapping[str, Any]) -> Found:
    found = language_subspace(texts.means, **settings)
    return Found(
        into(found.basis, texts.diffmean),
        found.basis,
        {"rank": found.basis.shape[1], "explained": found.explained},
    )


METHODS: dict[str, Method] = {
    DIFFMEAN: Method(
        "difference of the two languages' means; best of all for language forcing in CLaS-Bench",
        "arXiv 2601.08331",
        "text",
        _diffmean,
    ),
    "pca": Method(
        "the line along which translations differ most",
        "arXiv 2310.01405",
        "parallel text",
        _pca,
        parallel=True,
    ),
    "lda": Method(
        "Fisher's discriminant: the difference of the means beside the spread within the languages",
        "Ledoit and Wolf 2004",
        "text",
        _lda,
    ),
    "probe": Method(
        "weights of a logistic classifier of the two languages",
        "arXiv 2601.08331",
        "text",
        _probe,
        {"penalty": PENALTY},
    ),
    "low-rank-shift": Method(
        "the few directions that the shift takes, as many as its spectrum says, and a window of layers",
        "arXiv 2602.00945",
        "parallel text",
        _low_rank_shift,
        {"seed": 0, "bootstraps": BOOTSTRAPS},
        parallel=True,
    ),
    "language-subspace": Method(
        "where the means of all languages of the corpus lie beside each other",
        "arXiv 2505.15257",
        "text of all languages",
        _language_subspace,
        {"rank": None},
        all_languages=True,
    ),
    SAE: Method(
        "features of a sparse autoencoder that fire on the target's texts and not on random tokens",
        "arXiv 2604.03532",
        "text, autoencoder",
        None,
        {"target_rate": TARGET_RATE, "random_rate": RANDOM_RATE, "seed": 0},
    ),
}


def method_of(name: str) -> Method:
    """
    Raises:
        UsageError: no such method.
    """
    if name not in METHODS:
        raise UsageError(f"method {name!r} is unknown: choose from {', '.join(METHODS)}")
    return METHODS[name]
