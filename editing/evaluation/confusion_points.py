"""Points where answers of `broca ask` change their language.

An answer should be in the language of its question.  It changes at its first line that counts in the Language Confusion
Benchmark (``editing.evaluation.language_confusion``) and is identified as another language: at the first word of ASCII
letters if the language is not written in Latin script and the line has one, else at the start of the line.  The paper of
``neurons.scorers.language_confusion`` identifies the language of single tokens, of which most have none.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from editing.evaluation.ask import read_answers
from editing.evaluation.asking import chat_tokens
from editing.evaluation.language_confusion import in_latin_script, wrong_line
from neurons.errors import UsageError
from neurons.models.source import LoadedModel
from neurons.recording.confusion import ConfusionPoint
from neurons.text.conversations import ANOTHER_MODEL
from neurons.text.corpus_files import language_label

_ASCII_WORD = re.compile(r"[A-Za-z]{2,}")


@dataclass(frozen=True)
class ChangedAnswer:
    """An answer that changes its language.

    Attributes:
        question: of the answer.
        answer: the whole answer.
        at: its first character in a wrong language.
    """

    question: str
    answer: str
    at: int


@dataclass(frozen=True)
class ChangedAnswers:
    """The answers of a file that change their language.

    Attributes:
        of: language -> answers; languages without any are left out.
        answers: language -> number of all its answers.
        digest: sha256 of the file, hexadecimal.
    """

    of: dict[str, tuple[ChangedAnswer, ...]]
    answers: dict[str, int]
    digest: str


def change_of_language(
    answer: str, language: str, identify: Callable[[str], tuple[str, float]]
) -> int | None:
    """The first character of an answer in a wrong language; None if no line is in one.

    Args:
        answer: the text.
        language: the language that it should be in.
        identify: a line -> its language and the probability of it.
    """
    start = 0
    for line in answer.split("\n"):
        if wrong_line(line, language, identify):
            word = None if in_latin_script(language) else _ASCII_WORD.search(line)
            return start + (len(line) - len(line.lstrip()) if word is None else word.start())
        start += len(line) + 1
    return None


def read_changed_answers(
    path: Path, languages: Sequence[str] | None, identify: Callable[[str], tuple[str, float]]
) -> ChangedAnswers:
    """Read a file of `broca ask`.

    Args:
        path: the file.
        languages: languages of the questions; None: all.
        identify: as in ``change_of_language``.

    Raises:
        UsageError: no answer changes its language.
        BrocaError: another kind of file.
    """
    wanted = None if languages is None else {language_label(name) for name in languages}
    changed: dict[str, list[ChangedAnswer]] = {}
    answers: dict[str, int] = {}
    for (language, _), row in read_answers(path).items():
        if wanted is not None and language not in wanted:
            continue
        question, answer = (message["content"] for message in row["messages"])
        answers[language] = answers.get(language, 0) + 1
        at = change_of_language(answer, language, identify)
        if at is not None:
            changed.setdefault(language, []).append(ChangedAnswer(question, answer, at))
    if not changed:
        raise UsageError(
            f"{path}: none of {sum(answers.values())} answers changes its language: give answers of more questions, or "
            "points of your own (--prompts)"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ChangedAnswers({name: tuple(of) for name, of in changed.items()}, answers, digest)


def points_of_answers(loaded: LoadedModel, changed: ChangedAnswers) -> dict[str, list[ConfusionPoint]]:
    """The points in tokens: the question in the chat template, the answer up to the point, and the token that has it.

    Raises:
        UsageError: a tokenizer without character offsets, or a chat template that fails.
    """
    tokenizer = loaded.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"the tokenizer of {loaded.name} has no character offsets for its tokens: provide a tokenizer.json"
        )
    points: dict[str, list[ConfusionPoint]] = {}
    for language, of_language in changed.of.items():
        points[language] = []
        for answer in of_language:
            encoded = tokenizer(answer.answer, add_special_tokens=False, return_offsets_mapping=True)
            ids = encoded["input_ids"]
            place = next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > answer.at)
            prompt = chat_tokens(tokenizer, answer.question, ANOTHER_MODEL)
            points[language].append(ConfusionPoint([*prompt, *ids[:place]], ids[place]))
    return points
