"""Which language a text is in, by py3langid, with an outcome "other"."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from neurons.errors import UsageError

# Varieties that py3langid tells apart and ISO 639-3 counts to a macrolanguage: a Chinese text is often
# "Wu" to it. They count to the macrolanguage unless they are asked for by name.
MACROLANGUAGES = {"wuu": "zh", "yue": "zh", "arz": "ar", "ary": "ar", "nn": "no"}
OTHER = "other"
EMPTY = "empty"


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def check_languages(languages: Sequence[str]) -> None:
    """Refuse language names that the identifier does not know (it uses ISO 639-1 codes).

    Raises:
        UsageError: by name.
    """
    known = set(_identifier().labels)
    unknown = [language for language in languages if language not in known]
    if unknown:
        raise UsageError(
            f"the language identifier does not know {', '.join(unknown)}: name corpus files by ISO 639-1 "
            "codes (en, fr, zh, ...)"
        )


def identify_language(text: str, languages: Sequence[str]) -> str:
    """The most probable of ``languages``; "other" where these share less than half of the probability
    over all languages that py3langid knows; "empty" for a text without a letter."""
    if not any(character.isalpha() for character in text):
        return EMPTY
    probability = dict.fromkeys(languages, 0.0)
    for label, value in _identifier().rank(text):
        language = label if label in probability else MACROLANGUAGES.get(label, label)
        if language in probability:
            probability[language] += float(value)
    if sum(probability.values()) < 0.5:
        return OTHER
    return max(probability, key=lambda language: probability[language])
