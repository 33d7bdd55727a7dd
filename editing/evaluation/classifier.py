"""Classifiers: which label each text has.  The default is language identification; a user's may take its place.

A file of keywords (JSON or TOML) has a table for each label:

    [python]
    keywords = ["def", "self"]                     # whole words, in any case
    patterns = ["^ *import"]                       # regular expressions; ^ and $ match at every line

The label is the one with the most matches; "other" at a tie, also of none.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from editing.evaluation import language_id
from editing.evaluation.language_id import EMPTY, IDENTIFIED, OTHER
from neurons.errors import BrocaError, UsageError
from neurons.files.digest import digest, digest_of, digests_of
from neurons.files.json_file import read_json
from neurons.models.source import BESIDE_WEIGHTS, locate, pick_device, quietly
from neurons.text.batches import context_length

Labelling = Callable[[list[str]], list[str]]
KEYWORD_FILES = (".json", ".toml")
EXAMPLE = '{"formal": {"keywords": ["sincerely"]}, "informal": {"keywords": ["cheers"], "patterns": ["!!+"]}}'
_UNNAMED = re.compile(r"LABEL_\d+")  # what transformers calls the classes of a model without labels


@dataclass(frozen=True)
class Classifier:
    """Gives each text a label.

    Attributes:
        name: "py3langid", or the file, model or function.
        digest: sha256 (hexadecimal) of the file, of the model's files or of the function's source; None: of a function
            without one, or of py3langid, whose version is among the packages of a result.
        labels: the labels that it can give; None: any.
        label_all: texts -> the label of each; None: language identification, which chooses among given languages.
    """

    name: str
    digest: str | None
    labels: frozenset[str] | None
    label_all: Labelling | None = None

    @property
    def identifies_languages(self) -> bool:
        """Whether it is the default."""
        return self.label_all is None

    @property
    def provenance(self) -> dict[str, str | None]:
        """Name and digest, as JSON values."""
        return {"name": self.name, "digest": self.digest}

    def classify(self, texts: Sequence[str], labels: Sequence[str]) -> list[str]:
        """The label of each text: one of ``labels``, "other", or "empty".

        For language identification a text without a letter is empty, for others one of white space.

        Raises:
            UsageError: a function that does not give one string for each text.
        """
        if self.label_all is None:
            return [language_id.identify_language(text, labels) for text in texts]
        written = [text for text in texts if text.strip()]
        given = self.label_all(written) if written else []
        if len(given) != len(written) or not all(isinstance(label, str) for label in given):
            raise UsageError(
                f"classifier {self.name}: it must return {len(written)} strings for {len(written)} texts: one each"
            )
        of_written = iter(given)
        of_texts = [next(of_written) if text.strip() else EMPTY for text in texts]
        return [label if label in (*labels, EMPTY) else OTHER for label in of_texts]

    def sentence_share(self, text: str, label: str, labels: Sequence[str]) -> float:
        """Fraction of the text's sentences that have a label; 0 for a text without a letter."""
        of_sentences = self.classify(language_id.sentences(text), labels)
        return of_sentences.count(label) / len(of_sentences) if of_sentences else 0.0

    def knows(self, label: str) -> bool:
        """Whether it can give a label."""
        return self.labels is None or label in self.labels

    def require(self, labels: Sequence[str]) -> None:
        """Check that it can give the labels.

        Raises:
            UsageError: names the unknown labels.
        """
        unknown = [label for label in labels if not self.knows(label)]
        if unknown and self.identifies_languages:
            raise UsageError(
                f"the language identifier does not know {', '.join(unknown)}: name corpus files by ISO 639-1 "
                "codes (en, fr, zh, ...), leave these out with --languages, or give a --classifier"
            )
        if unknown:
            raise UsageError(
                f"classifier {self.name}: it does not know {', '.join(unknown)}, only "
                f"{', '.join(sorted(self.labels or ()))}: add labels to it, or leave these out with --languages"
            )


LANGUAGE_IDENTIFICATION = Classifier("py3langid", None, IDENTIFIED)


def load_classifier(
    given: Classifier | Labelling | Path | str | None = None,
    labels: Iterable[str] | None = None,
    device: str = "auto",
) -> Classifier:
    """The classifier.

    Args:
        given: None: language identification.  A function from texts to a label each.  A ``.json`` or ``.toml`` file of
            keywords (see the module's docstring).  Or a text-classification model of transformers, by hub id or
            directory, in safetensors; its labels are those of its config.
        labels: the labels that a function can give; None: any.
        device: of a model.

    Raises:
        UsageError: no such file or model, a file in another form, a label without keywords, an invalid regular
            expression, or a model that classifies no text or names no labels.
        BrocaError: a model that transformers cannot load.
    """
    if given is None:
        return LANGUAGE_IDENTIFICATION
    if isinstance(given, Classifier):
        return given
    if isinstance(given, str | Path):
        path = Path(given).expanduser()
        return _of_keywords(path) if path.suffix in KEYWORD_FILES else _of_model(str(given), device)
    name = f"{given.__module__}.{getattr(given, '__qualname__', type(given).__qualname__)}"
    try:
        source = hashlib.sha256(inspect.getsource(given).encode()).hexdigest()
    except (OSError, TypeError):
        source = None
    return Classifier(name, source, None if labels is None else frozenset(labels), given)


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class _Words:
    keywords: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()


def _of_keywords(path: Path) -> Classifier:
    try:
        content = tomllib.loads(path.read_text("utf-8")) if path.suffix == ".toml" else read_json(path)
        words = TypeAdapter(Mapping[str, _Words]).validate_python(content)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such classifier") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not TOML ({error})") from error
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"])) or "the file"
        raise UsageError(
            f"{path}: {place} is not as it should be: write keywords and patterns of each label, as {EXAMPLE}"
        ) from error
    if not words:
        raise UsageError(f"{path}: has no label: write {EXAMPLE}")
    expressions = {label: _expressions(path, label, of_label) for label, of_label in words.items()}

    def label_of(text: str) -> str:
        matches = {
            label: sum(1 for one in of_label for _ in one.finditer(text))
            for label, of_label in expressions.items()
        }
        best = [label for label, count in matches.items() if count == max(matches.values())]
        return best[0] if len(best) == 1 and matches[best[0]] else OTHER

    return Classifier(str(path), digest(path), frozenset(words), lambda texts: [*map(label_of, texts)])


def _expressions(path: Path, label: str, words: _Words) -> list[re.Pattern[str]]:
    if not any((*words.keywords, *words.patterns)):
        raise UsageError(
            f"{path}: label {label!r} has no keywords or patterns: write some, or remove the label"
        )
    if "" in (*words.keywords, *words.patterns):
        raise UsageError(f"{path}: label {label!r} has an empty keyword or pattern: remove it")
    # Bounded where the keyword ends in a word character; "=>" is not.
    whole = [rf"(?:(?<!\w)|(?!\w)){re.escape(word)}(?:(?!\w)|(?<!\w))" for word in words.keywords]
    found = [re.compile(one, re.IGNORECASE) for one in whole]
    for pattern in words.patterns:
        try:
            found.append(re.compile(pattern, re.MULTILINE))
        except re.error as error:
            raise UsageError(
                f"{path}: label {label!r}: {pattern!r} is no regular expression ({error}): fix it"
            ) from error
    return found


def _of_model(model: str, device: str) -> Classifier:
    checkpoint = locate(model)
    config = read_json(checkpoint / "config.json")
    architectures = config.get("architectures") or ["no architecture"]
    if not architectures[0].endswith("ForSequenceClassification"):
        raise UsageError(
            f"{model}: {architectures[0]} classifies no text: give a text-classification model, or a file of "
            f"keywords ({' or '.join(KEYWORD_FILES)})"
        )
    labels = frozenset((config.get("id2label") or {}).values())
    if not labels or all(_UNNAMED.fullmatch(label) for label in labels):
        raise UsageError(
            f"{model}: names no labels: write them into id2label and label2id of its config.json, named as the corpus"
        )
    from transformers import pipeline

    try:
        with quietly():
            made: Any = pipeline(
                "text-classification",
                model=str(checkpoint),
                device=pick_device(device),
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
    except (ValueError, OSError, ImportError) as error:
        raise BrocaError(f"{model}: transformers cannot load it as a classifier ({error})") from error
    made.tokenizer.model_max_length = min(
        made.tokenizer.model_max_length, context_length(made.model) or made.tokenizer.model_max_length
    )
    # One text at a time: padding would change its scores in the last digits.
    return Classifier(
        model,
        digest_of(digests_of(checkpoint, (*BESIDE_WEIGHTS, ".safetensors"))),
        labels,
        lambda texts: [one["label"] for one in made(texts, truncation=True, batch_size=1)],
    )
