"""The base class of direction methods: a frozen dataclass of settings and an estimator for one site of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from editing.directions.texts import Estimate, Texts
from neurons.setting import Configured


@dataclass(frozen=True)
class DirectionMethod(Configured):
    """Class attributes that every method declares; the dataclass fields are its settings.

    Attributes:
        name: the value of ``--method``.
        line: a description in one line.
        source: the publication.
        needs: its required inputs.
        parallel: whether line i must be the same text in both languages.
        all_languages: whether it reads every language of the corpus and not only the two.
    """

    name: ClassVar[str]
    line: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[str] = "text"
    parallel: ClassVar[bool] = False
    all_languages: ClassVar[bool] = False

    def estimate(self, texts: Texts) -> Estimate:
        """The direction at one site of one layer."""
        raise NotImplementedError
