"""The base classes of direction methods: a frozen dataclass of settings, with an estimator for one site of a layer or a
function of preferences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from editing.directions.autoencoder import Autoencoder, LanguageFeatures
from editing.directions.texts import Estimate, Texts
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Progress
from neurons.setting import Configured
from neurons.text.batches import TokenBatch
from neurons.text.token_rows import TokenRow


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


@dataclass(frozen=True)
class Given:
    """A vector that a method computes by itself at one site of one layer.

    Attributes:
        site: "attn_out", "mlp_out" or "block_out".
        layer: 0 to L - 1.
        vector: float64 [d].
        estimate: makes the estimate at this place; None: the vector alone.
    """

    site: str
    layer: int
    vector: torch.Tensor
    estimate: Callable[[Texts], Estimate] | None = None

    def at_place(self, texts: Texts) -> Estimate:
        """The estimate at this place."""
        return Estimate(self.vector) if self.estimate is None else self.estimate(texts)


@dataclass(frozen=True)
class PreferenceMethod(DirectionMethod):
    """A method that reads preferences (``neurons.text.preferences``).

    Attributes:
        rows_together: rows that one backward pass must hold.
    """

    needs: ClassVar[str] = "preferences"
    rows_together: ClassVar[int] = 1

    def given(
        self, loaded: LoadedModel, rows: Mapping[str, Sequence[TokenRow]], progress: Progress | None = None
    ) -> tuple[list[Given], dict[str, Any]]:
        """Its vectors, from rejected to chosen, and JSON values for the metadata.

        At other sites and layers the direction is the line of the nearest, as far as DiffMean goes along it.

        Args:
            loaded: the model.
            rows: of ``neurons.text.preferences.preference_rows``.
            progress: called with the number of preferences that are done.
        """
        raise NotImplementedError
