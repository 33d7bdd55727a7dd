"""Points where answers change their language, with an identifier that goes by letters, and the command."""

import json

import models
import pytest

from editing.evaluation.confusion_points import change_of_language, points_of_answers, read_changed_answers
from neurons.errors import UsageError
from neurons.models.source import load_model
from neurons.neuron_sets.neuron_set import load_neuron_set

FRENCH = "le chat dort sur la table"
ENGLISH = "the cat sleeps on the table"


def by_letters(line):
    if line.isascii():
        return ("en" if "the" in line else "fr"), 0.9
    return "ru", 0.9


@pytest.mark.parametrize(
    ("answer", "language", "at"),
    [
        (FRENCH, "fr", None),
        (ENGLISH, "fr", 0),
        (f"{FRENCH}\n  {ENGLISH}", "fr", len(FRENCH) + 3),
        (f"{FRENCH}\nthe cat", "fr", None),  # too short to count
        (f"{FRENCH}\n\nthe, cat; sleeps: on the table", "fr", len(FRENCH) + 2),
        ("", "fr", None),
        ("кошка спит на этом столе", "ru", None),
        (f"«да», {ENGLISH}", "zh", 6),
        ("кошка спит на этом столе", "ja", 0),  # without a Latin word: the start
    ],
)
def test_the_first_character_in_a_wrong_language(answer, language, at):
    assert change_of_language(answer, language, by_letters) == at


def written(path, answers):
    rows = [
        {
            "question_id": str(i),
            "language": language,
            "messages": [{"role": "user", "content": "abe cab?"}, {"role": "assistant", "content": answer}],
            "of": "0",
        }
        for i, (language, answer) in enumerate(answers)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def test_points_are_tokens_after_the_question_and_the_answer_so_far(chatting, tmp_path):
    answers = [("fr", f"{FRENCH}\n{ENGLISH}"), ("fr", FRENCH), ("en", ENGLISH)]
    path = written(tmp_path / "answers.jsonl", answers)
    changed = read_changed_answers(path, None, by_letters)
    assert changed.answers == {"fr": 2, "en": 1} and list(changed.of) == ["fr"]
    ((point,),) = points_of_answers(chatting, changed).values()
    text = chatting.tokenizer.decode(point.ids)
    assert "abe cab?" in text and text.endswith(f"{FRENCH}\n")
    assert ENGLISH.startswith(chatting.tokenizer.decode([point.wrong]))
    with pytest.raises(UsageError, match="none of 1 answers"):
        read_changed_answers(path, ["en"], by_letters)


def test_the_command(broca, chat_model, tmp_path, monkeypatch):
    # Real sentences: the command identifies languages by fastText.
    french = "Le chat dort tous les jours sur la table de la cuisine."
    english = "However, the weather was very nice on that day in the city."
    answers = written(tmp_path / "answers.jsonl", [("fr", f"{french}\n{english}"), ("fr", french)])
    out = tmp_path / "neurons.safetensors"
    arguments = ["identify", chat_model, "--method", "language-confusion", "--out", out, "--top-rate", "0.05"]
    status, _, err = broca(*arguments, "--answers", answers, "--sibling", chat_model, "--json")
    assert status == 0 and "1 of 2 answers" in err
    # The sibling is the model itself: nothing is left.
    assert load_neuron_set(out).of("fr").numel() == 0
    status, _, err = broca(*arguments, "--answers", answers, "--set", "top=20")
    assert status == 0, err
    assert len(load_neuron_set(out).of("fr")) == round(0.05 * 3 * 48)
    (tmp_path / "prompts").mkdir()
    row = json.dumps({"prompt": models.WORDS["qaa"][0], "answer": " him"})
    (tmp_path / "prompts" / "qaa.jsonl").write_text(row, encoding="utf-8")
    status, _, err = broca(*arguments, "--prompts", tmp_path / "prompts")
    assert status == 0, err
    for words, reason in (
        ([], "either --answers"),
        (["--answers", answers, "--prompts", tmp_path / "prompts"], "either --answers"),
        (["--answers", answers, "--corpus", tmp_path], "--corpus is not supported"),
    ):
        status, _, err = broca(*arguments, *words)
        assert status == 2 and reason in err
    bits = []

    def load(*words, **more):
        bits.append(more.pop("bits"))
        return load_model(*words, **more)

    monkeypatch.setattr("neurons.models.source.load_model", load)
    more = ["--sibling", chat_model, "--load-in-4bit"]
    status, _, err = broca(*arguments, "--answers", answers, *more)
    assert status == 0 and bits == [4, 4], err
    monkeypatch.setattr("neurons.models.source.load_model", None)
    arguments[1] = tmp_path / "none"
    status, _, err = broca(*arguments, "--answers", answers, "--sibling", chat_model)
    assert status == 2 and "none: there is no such model" in err  # before the sibling is read
