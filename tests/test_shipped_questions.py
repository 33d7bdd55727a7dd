"""The questions that the repository ships: parallel, complete, and each in the language of its file."""

from pathlib import Path

import pytest

from editing.evaluation.language_id import identify_language
from editing.evaluation.questions import read_questions

QUESTIONS = Path(__file__).parents[1] / "artifacts" / "questions"
LANGUAGES = [
    "ar", "cs", "de", "el", "en", "es", "fa", "fr", "he", "hi", "id", "it", "ja", "ko", "nl", "pl", "pt",
    "ro", "ru", "sv", "th", "tr", "uk", "vi", "zh",
]  # fmt: skip


def test_every_language_asks_the_same_questions():
    asked = read_questions(QUESTIONS).of
    assert sorted(asked) == LANGUAGES
    for language, some in asked.items():
        assert [one.question_id for one in some] == [str(i) for i in range(1, 65)], language
        assert len({one.text for one in some}) == 64, language


@pytest.mark.parametrize("language", LANGUAGES)
def test_questions_are_in_the_language_of_their_file(language):
    asked = read_questions(QUESTIONS / f"{language}.jsonl", language).of[language]
    assert [one.question_id for one in asked if identify_language(one.text, LANGUAGES) != language] == []
