"""A direction method: a frozen dataclass of its settings that finds a direction at one site of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from editing.directions.texts import Found, Texts
from neurons.scorers.setting import Configured


@dataclass(frozen=True)
class DirectionMethod(Configured):
    """What every method declares; its fields are its settings.

    Attributes:
        name: on the command line.
        line: what it is, in a line.
        source: where it was published.
        needs: what it must be given.
        parallel: whether line i must be the same text in both languages.
        all_languages: whether it reads every language of the corpus and not the two alone.
    """

    name: ClassVar[str]
    line: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[str] = "text"
    parallel: ClassVar[bool] = False
    all_languages: ClassVar[bool] = False

    def find(self, texts: Texts) -> Found:
        """The direction at one site of one layer."""
        raise NotImplementedError
