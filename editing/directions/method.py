"""The base class of direction methods: a frozen dataclass of settings and an estimator for one site of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from editing.directions.autoencoder import Autoencoder, LanguageFeatures
from editing.directions.texts import Estimate, Texts
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Progress
from neurons.setting import Configured
from neurons.text.batches import TokenBatch


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
        autoencoders: whether it reads sparse autoencoders; it then has ``read`` and ``estimate_at`` in place of
            ``estimate``.
    """

    name: ClassVar[str]
    line: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[str] = "text"
    parallel: ClassVar[bool] = False
    all_languages: ClassVar[bool] = False
    autoencoders: ClassVar[bool] = False

    def estimate(self, texts: Texts) -> Estimate:
        """The direction at one site of one layer."""
        raise NotImplementedError

    def read(
        self,
        loaded: LoadedModel,
        batches: Mapping[str, Sequence[TokenBatch]],
        source: str,
        target: str,
        autoencoders: Sequence[Autoencoder],
        progress: Progress | None = None,
    ) -> Sequence[LanguageFeatures]:
        """The language's features in each autoencoder."""
        raise NotImplementedError

    def estimate_at(self, features: LanguageFeatures, texts: Texts) -> Estimate:
        """The direction at the site of an autoencoder, from its features."""
        raise NotImplementedError
