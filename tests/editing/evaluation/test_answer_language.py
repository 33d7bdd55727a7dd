"""The language of answers: whole texts, lines and first words, on texts that a person can judge."""

import pytest

from editing.evaluation.answer_language import answer_language, beginning, prose

FRENCH = "La vitesse de la lumière est une constante de la nature, et rien ne va plus vite qu'elle."
ENGLISH = "The speed of light is a constant of nature, and nothing in the universe moves faster."
MIXED = f"{FRENCH}\n{ENGLISH}\n{FRENCH}\n{FRENCH}"
LATE = "The average human eye sees une grande partie de la lumière qui vient du soleil pendant la journée."
LANGUAGES = ("de", "en", "fr", "zh")


def test_fractions_of_whole_texts_lines_and_beginnings():
    fractions = answer_language([FRENCH, ENGLISH, MIXED, LATE], "fr", LANGUAGES, "en")
    assert fractions.answers == 4
    assert fractions.whole == 3 / 4  # all except ENGLISH
    assert fractions.lines == 2 / 4  # neither ENGLISH nor MIXED
    assert fractions.begins == 2 / 4  # neither ENGLISH nor LATE


def test_beginnings_need_questions_in_another_language():
    assert answer_language([FRENCH], "fr", LANGUAGES, "fr").begins is None
    assert answer_language([FRENCH], "fr", LANGUAGES).begins is None


def test_code_is_in_no_language():
    assert prose(f"{FRENCH}\n```python\nfor line in lines: print(line)\n```\n").strip() == FRENCH
    assert prose(f"{FRENCH} ```python\nfor line in lines").strip() == FRENCH
    code = "```python\n# the speed of light is a constant of nature and nothing moves faster\n```"
    assert answer_language([f"{FRENCH}\n{code}"], "fr", LANGUAGES, "en").lines == 1


@pytest.mark.parametrize("text", ["", "1 2 3", "```python\nprint(1)\n```"])
def test_an_answer_without_prose_is_in_no_language(text):
    fractions = answer_language([text], "fr", LANGUAGES, "en")
    assert (fractions.whole, fractions.lines, fractions.begins) == (0, 0, 0)


def test_short_lines_are_judged_together():
    assert answer_language(["1. le pain\n2. le lait\n3. la farine\n4. les œufs"], "fr", LANGUAGES).lines == 1


def test_a_beginning_is_five_words_or_characters():
    assert beginning("Le chat noir dort sur la table.") == "le chat noir dort sur"
    assert beginning("光速是自然界的常数") == "光 速 是 自 然"
