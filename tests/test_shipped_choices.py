"""The multiple-choice items and requests for code that the repository ships: parallel, balanced, right where it can be told."""

import contextlib
import io
from collections import Counter
from pathlib import Path

import pytest

from editing.evaluation.answer_language import prose
from editing.evaluation.choices import read_choices
from editing.evaluation.code_answers import blocks
from editing.evaluation.language_id import more_probable
from editing.evaluation.questions import read_questions
from editing.pipeline.lock_kinds import KEPT

ARTIFACTS = Path(__file__).parents[1] / "artifacts"


@pytest.fixture(scope="module")
def items():
    return read_choices(ARTIFACTS / "choices")


@pytest.fixture(scope="module")
def requests():
    return read_questions(ARTIFACTS / "code_requests").of


def test_every_kept_language_has_the_same_items(items, requests):
    assert sorted(items) == sorted(requests) == sorted(KEPT)
    for language in KEPT:
        assert [one.question_id for one in items[language]] == [str(i) for i in range(1, 201)], language
        assert len({one.text for one in items[language]}) > 190, language
        assert [one.question_id for one in requests[language]] == [str(i) for i in range(1, 13)], language
        assert len({one.text for one in requests[language]}) == 12, language


def test_the_right_answers_are_balanced_and_the_same_in_every_language(items):
    english = [one.answer for one in items["en"]]
    assert Counter(english) == dict.fromkeys(range(4), 50)
    for language in KEPT:
        assert [one.answer for one in items[language]] == english, language


@pytest.mark.parametrize("language", KEPT)
def test_items_and_requests_are_in_the_language_of_their_file(items, requests, language):
    texts = [(one.question_id, " ".join([prose(one.text), *one.choices])) for one in items[language]]
    texts += [(one.question_id, one.text) for one in requests[language]]
    assert [number for number, text in texts if more_probable(text, KEPT) != language] == []


@pytest.mark.parametrize("language", KEPT)
def test_numbers_and_code_are_the_same_in_every_language(items, language):
    for here, english in zip(items[language], items["en"], strict=True):
        assert blocks(here.text) == blocks(english.text)
        if not any(letter.isalpha() for choice in english.choices for letter in choice):
            assert here.choices == english.choices, here.question_id


def test_the_right_answers_to_code_are_what_it_prints(items):
    programs = [one for one in items["en"] if blocks(one.text)]
    assert len(programs) == 25
    for one in programs:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(blocks(one.text)[0], {})
        assert printed.getvalue().strip() == one.choices[one.answer], one.question_id


def test_the_right_answers_to_sums_are_their_values(items):
    sums = [one for one in items["en"] if one.text.startswith("Calculate ")]
    assert len(sums) == 12
    for one in sums:
        term = one.text.removeprefix("Calculate ").partition(". ")[0]
        values = [eval(choice) for choice in one.choices]
        value = eval(term.replace("×", "*").replace("÷", "/"))
        assert [place for place, choice in enumerate(values) if choice == value] == [one.answer], term
