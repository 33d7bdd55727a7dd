"""The logit lens by language (``neurons.recording.language_lens``), before and after an edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from editing.evaluation.likelihood import Steering
from neurons.files.json_file import Figure
from neurons.models.source import LoadedModel
from neurons.recording.language_lens import language_masses, token_languages
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus
from neurons.text.token_budget import COUNTS


@dataclass(frozen=True)
class LanguageLens:
    """The mass of each language's tokens after each layer, at the last token of each prompt.

    Attributes:
        languages: the K languages.
        tokens: language -> number of tokens of the vocabulary that are its own.
        positions: number of prompts.
        masses: model ("base", "edited", ...) -> a number of each of the L layers and K languages; the rest to 1 is on
            tokens of no language.
    """

    languages: tuple[str, ...]
    tokens: Mapping[str, int]
    positions: int
    masses: Mapping[str, tuple[tuple[Figure, ...], ...]]

    def mass(self, model: str, languages: Sequence[str]) -> list[float]:
        """The mass of some languages together after each layer."""
        places = [self.languages.index(language) for language in languages]
        return [sum(of_layer[place] for place in places) for of_layer in self.masses[model]]


def language_lens(
    loaded: LoadedModel,
    text: Corpus,
    prompts: Sequence[Sequence[int]],
    models: Mapping[str, Steering],
) -> LanguageLens:
    """Measure the lens of several edits of a model.

    Args:
        loaded: the unedited model.
        text: from which the languages of tokens are counted.
        prompts: token ids of each prompt.
        models: name -> a context in which the model is edited; ``nullcontext`` is the unedited model.

    Raises:
        UsageError, BrocaError: as ``language_batches`` and ``language_masses``.
    """
    batches = language_batches(loaded, text, default=COUNTS.tokens)
    of_tokens = token_languages(batches, loaded.embedding_rows)
    masses = {}
    for name, steering in models.items():
        with steering():
            found = language_masses(loaded, prompts, of_tokens, len(batches))
        masses[name] = tuple(map(tuple, found.tolist()))
    counts = {language: int((of_tokens == k).sum()) for k, language in enumerate(batches)}
    return LanguageLens(tuple(batches), counts, len(prompts), masses)
