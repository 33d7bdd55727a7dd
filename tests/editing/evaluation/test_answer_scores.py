"""Published scores: hand-counted answers, the rates by plain loops, and a judge's replies."""

import dataclasses

import pytest

from editing.evaluation import language_forcing
from editing.evaluation.answer_scores import answer_scores
from editing.evaluation.fasttext_identifier import FastTextIdentifier, included_model
from editing.evaluation.language_confusion import PassRates, english_words, in_latin_script, pass_rates
from editing.evaluation.language_forcing import Forcing, forcing, rating_in, ratings
from neurons.errors import BrocaError


def by_first_letter(text):
    """A made-up identifier: the first letter names the language, a "?" makes it unsure."""
    return {"f": "fr", "e": "en", "r": "ru", "z": "zh"}.get(text[:1], ""), 0.3 if "?" in text else 0.9


ANSWERS = [
    "f un deux trois quatre\nf cinq six sept huit",  # passes
    "f un deux trois quatre\ne one two three four",  # a line in another language
    "f un deux",  # too short to count
    "f un deux trois, quatre cinq",  # passes; punctuation is no word
    "f un deux table quatre",  # passes the lines; "table" is English
]


def test_pass_rates_by_hand():
    english = english_words(["table", "the", "Paris", "chair\n"])
    assert english == {"table", "chair"}
    assert pass_rates(ANSWERS, "fr", by_first_letter) == PassRates(3 / 4, None, None, 4)
    # Not measured in Latin script.
    assert pass_rates(ANSWERS, "fr", by_first_letter, english).words is None
    russian = [answer.replace("f ", "r ") for answer in ANSWERS]
    assert pass_rates(russian, "ru", by_first_letter, english) == PassRates(
        3 / 4, 2 / 3, 2 * (3 / 4) * (2 / 3) / (3 / 4 + 2 / 3), 4
    )
    assert pass_rates(["f un"], "fr", by_first_letter) == PassRates(None, None, None, 0)
    # A question that the model goes on with does not count.
    assert pass_rates([f"{ANSWERS[0]}\nQ: one two three four five"], "fr", by_first_letter).lines == 1
    # An em dash separates words, and a probability of 0.3 is not enough.
    assert pass_rates(["f a—b—c—d"], "fr", by_first_letter).answers == 1
    assert pass_rates(["f a b c d ?"], "fr", lambda line: ("fr", 0.3)).lines == 0


def test_words_of_chinese_are_counted_without_spaces():
    assert pass_rates(["z今天天气很好"], "zh", by_first_letter).answers == 1
    # A capitalised name is no English word.
    for name, rate in (("Python", 1), ("python", 0)):
        assert pass_rates([f"z我今天用 {name} 写程序"], "zh", by_first_letter, {"python"}).words == rate
    assert [in_latin_script(k) for k in ("fr", "ru", "zh", "ar", "tr")] == [True, False, False, False, True]


def test_the_steering_score_is_the_harmonic_mean_of_the_averages():
    answers = ["f a", "f b", "e c", ""]
    found = forcing(answers, "fr", by_first_letter, [2, 1, None, 0])
    assert found == Forcing(0.5, 0.5, 0.5, 4, 3)
    assert forcing(answers, "fr", by_first_letter) == Forcing(0.5, None, None, 4, 0)
    assert forcing(answers, "fr", by_first_letter, [0, 0, 0, 0]).steering == 0


@pytest.mark.parametrize(
    ("label", "target", "share"),
    [("yue", "zh", 1), ("yue", "yue", 1), ("nn", "no", 1), ("arz", "ar", 0), ("yue", "no", 0)],
)
def test_varieties_count_as_clas_bench_counts_them(label, target, share):
    assert forcing(["a"], target, lambda answer: (label, 0.9)).forcing == share
    if label != target:
        assert pass_rates(["a b c d e f"], target, lambda line: (label, 0.9)).lines == 0


@pytest.mark.parametrize(
    "reply, rating",
    [
        ("It is on the subject. Rating: [[2]]", 2),
        ("[[0]] is too low, so Rating: [[1]]", 1),
        ("I say [[1]].", 1),
        ("The rating is 2.", 2),
        ("**2**", 2),
        ("Rating: [[2.0]]", None),
        ("[[0-1]]", None),
        ("I rate it 1/2.", None),
        ("Rating: [[3]]", None),
        ("1 of these 5 is right", None),
        ("", None),
    ],
)
def test_a_judges_reply(reply, rating):
    assert rating_in(reply) == rating


def test_the_judge_reads_question_answer_and_languages(chat_model, monkeypatch):
    from neurons.models.source import load_model

    judge, asked = load_model(str(chat_model), device="cpu"), []

    def generate(loaded, prompts, new_tokens, temperature):
        asked.extend(loaded.tokenizer.decode(prompt) for prompt in prompts)
        assert temperature == 0
        return [
            dataclasses.make_dataclass("Reply", ["text"])(f"Rating: [[{i}]]") for i in range(len(prompts))
        ]

    monkeypatch.setattr(language_forcing, "generate", generate)
    seen = []
    found = ratings(
        judge, ["ab {answer}", "cd"], ["ef", "gh"], "English", "French", "{source} {target}", seen.append
    )
    assert found == [0, 1] and seen == [2]
    # The template is the tiny model's; nothing in a question is replaced.
    assert all(part in asked[0].replace(" ", "") for part in ("ab{answer}", "ef"))


def test_all_is_the_unweighted_mean():
    answers = {"en": ANSWERS, "ru": ["f un deux trois quatre", "e one two three four", "e"]}
    found = answer_scores(answers, "fr", by_first_letter, {"en": [2] * 5, "ru": [0, 0, 2]})
    assert [found[k].forcing.forcing for k in ("en", "ru", "all")] == [1.0, 1 / 3, 2 / 3]
    assert found["all"].forcing.relevance == pytest.approx((1 + 1 / 3) / 2)
    assert found["all"].forcing.answers == 8
    assert found["all"].confusion.lines == pytest.approx((3 / 4 + 1 / 2) / 2)
    # Without a target, each answer should be in the language of its question.
    assert answer_scores({"fr": ["f a"], "en": ["f a"]}, None, by_first_letter, {})["en"].forcing.forcing == 0


def test_fasttext_of_the_wheel(tmp_path):
    identify = FastTextIdentifier(included_model())
    label, probability = identify("Le chat dort sur\nle canapé du salon.")
    assert label == "fr" and probability > 0.5
    assert identify("  \n") == ("", 0.0)
    (tmp_path / "no.bin").write_bytes(b"not a model")
    with pytest.raises(BrocaError, match=r"no\.bin"):
        FastTextIdentifier(tmp_path / "no.bin")("text")
