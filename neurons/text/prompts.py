"""Prompts with answers: ``<language>.jsonl``, each line an object with ``prompt`` and ``answer``.

They may also be one ``.jsonl`` file, whose objects have a ``label`` too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neurons.errors import UsageError
from neurons.models.start_tokens import start_tokens
from neurons.text.corpus_files import corpus_files, language_label

EXAMPLE = '{"prompt": "The capital of France is", "answer": " Paris"}'
LABELLED = EXAMPLE[:-1] + ', "label": "capitals"}'


@dataclass(frozen=True)
class Prompt:
    """A prompt and its expected continuation."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Prompts:
    """Prompts of several languages.

    Attributes:
        of: language -> its prompts, in file order.
        digest: sha256 over languages and files, hexadecimal.
    """

    of: dict[str, tuple[Prompt, ...]]
    digest: str


def read_prompts(directory: Path, languages: Sequence[str] | None = None) -> Prompts:
    """Read a directory of ``<language>.jsonl``, or a ``.jsonl`` file whose lines have a label.

    Args:
        directory: holds the files, named as in a corpus (``neurons.text.corpus_files``); or the file.
        languages: languages to read, in this order; None reads all, sorted by name.

    Raises:
        UsageError: no such directory or file, an empty file, a language without prompts, or a line that is not a
            prompt; with an example.
    """
    if directory.is_file():
        return _of_one_file(directory, languages)
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory of <language>.jsonl with lines like {EXAMPLE}")
    try:
        files = corpus_files(directory, languages, (".jsonl",)).of
    except UsageError as error:
        raise UsageError(f"{error}; its lines are objects like {EXAMPLE}") from error
    digest = hashlib.sha256()
    prompts = {}
    for language, path in files.items():
        content = path.read_bytes()
        digest.update(json.dumps(language).encode() + content)
        prompts[language] = tuple(
            _prompt(path, number, line)
            for number, line in enumerate(content.split(b"\n"), start=1)
            if line.strip()
        )
        if not prompts[language]:
            raise UsageError(f"{path}: holds no prompt: write lines like {EXAMPLE}")
    return Prompts(prompts, digest.hexdigest())


def _of_one_file(path: Path, languages: Sequence[str] | None) -> Prompts:
    content = path.read_bytes()
    of_label: dict[str, list[Prompt]] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            prompt = _prompt(path, number, line, LABELLED)
            label = json.loads(line).get("label")
            if not isinstance(label, str) or not label:
                raise UsageError(f"{path}: line {number} has no label: write lines like {LABELLED}")
            of_label.setdefault(language_label(label), []).append(prompt)
    chosen = sorted(of_label) if languages is None else [language_label(name) for name in languages]
    if missing := [label for label in chosen if label not in of_label]:
        raise UsageError(f"{path}: no prompt for {', '.join(missing)} (it has {', '.join(sorted(of_label))})")
    if not chosen:
        raise UsageError(f"{path}: holds no prompt: write lines like {LABELLED}")
    digest = hashlib.sha256(json.dumps(chosen).encode() + content)
    return Prompts({label: tuple(of_label[label]) for label in chosen}, digest.hexdigest())


def _prompt(path: Path, number: int, line: bytes, example: str = EXAMPLE) -> Prompt:
    return Prompt(*row_strings(path, number, line, ("prompt", "answer"), example))


def row_strings(path: Path, number: int, line: bytes, names: Sequence[str], example: str) -> list[str]:
    """The strings of a JSON object.

    Args:
        path: of the file, for errors.
        number: of the line in it, for errors.
        line: the object.
        names: keys of the strings.
        example: an object with these keys.

    Raises:
        UsageError: not an object, or a missing or empty string.
    """
    try:
        value = json.loads(line)
        strings = [value[name] for name in names]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: line {number} is not an object like {example}") from error
    if not all(isinstance(string, str) and string for string in strings):
        raise UsageError(
            f"{path}: line {number}: {' and '.join(map(repr, names))} must be strings that are not empty: {example}"
        )
    return strings


def answer_tokens(tokenizer: Any, prompt: Prompt) -> tuple[list[int], list[int]]:
    """The prompt's tokens and its answer's.

    Both are tokenised together, as the model would read them.  If a token spans the end of the prompt, the answer
    is tokenised alone.

    Raises:
        UsageError: the prompt or the answer has no token.
    """
    start = [*start_tokens(tokenizer)]
    ids = tokenizer(prompt.prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(prompt.prompt + prompt.answer, add_special_tokens=False)["input_ids"]
    rest = whole[len(ids) :] if whole[: len(ids)] == ids else []
    answer = rest or tokenizer(prompt.answer, add_special_tokens=False)["input_ids"]
    if not start + ids or not answer:
        raise UsageError(
            f"the tokenizer gives no token for {prompt.prompt!r} or for its answer {prompt.answer!r}"
        )
    return start + ids, list(answer)
