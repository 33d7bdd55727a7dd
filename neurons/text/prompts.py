"""Prompts with answers: ``<language>.jsonl``, each line an object with ``prompt`` and ``answer``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neurons.errors import UsageError
from neurons.models.start_tokens import start_tokens
from neurons.text.corpus_files import corpus_files

EXAMPLE = '{"prompt": "The capital of France is", "answer": " Paris"}'


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
    """Read a directory of ``<language>.jsonl``.

    Args:
        directory: holds the files, named as in a corpus (``neurons.text.corpus_files``).
        languages: languages to read, in this order; None reads all, sorted by name.

    Raises:
        UsageError: no such directory or file, an empty file, or a line that is not a prompt; with an example.
    """
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


def _prompt(path: Path, number: int, line: bytes) -> Prompt:
    try:
        value = json.loads(line)
        prompt, answer = value["prompt"], value["answer"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: line {number} is not an object like {EXAMPLE}") from error
    if not isinstance(prompt, str) or not isinstance(answer, str) or not prompt or not answer:
        raise UsageError(
            f"{path}: line {number}: 'prompt' and 'answer' must be strings that are not empty: {EXAMPLE}"
        )
    return Prompt(prompt, answer)


def answer_token(tokenizer: Any, prompt: Prompt) -> tuple[list[int], int]:
    """The prompt's tokens and the first token of its answer.

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
    return start + ids, answer[0]
