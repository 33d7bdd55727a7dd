"""Which language a text is in."""

import pytest

from editing.evaluation.classifier import LANGUAGE_IDENTIFICATION
from editing.evaluation.language_id import (
    agreement,
    identify_language,
    second_opinion,
    sentences,
)

TEXTS = {
    "en": "The children were playing in the garden when it began to rain.",
    "fr": "Les enfants jouaient dans le jardin quand il a commencé à pleuvoir.",
    "de": "Die Kinder spielten im Garten, als es zu regnen anfing.",
    "es": "Los niños jugaban en el jardín cuando empezó a llover.",
    "zh": "孩子们正在花园里玩的时候，天开始下雨了。",
    "ar": "كان الأطفال يلعبون في الحديقة عندما بدأ المطر يهطل.",
    "hi": "बच्चे बगीचे में खेल रहे थे जब बारिश शुरू हुई।",
}


@pytest.mark.parametrize("language", TEXTS)
def test_tells_languages_apart(language):
    assert identify_language(TEXTS[language], tuple(TEXTS)) == language
    assert identify_language(TEXTS[language], (language, "ru")) == language


@pytest.mark.parametrize("language", TEXTS)
def test_other_is_no_language_of_the_list(language):
    others = tuple(name for name in TEXTS if name != language)
    assert identify_language(TEXTS[language], others) == "other"


@pytest.mark.parametrize("text", ["", "   \n", "12 345 ... !", "。！？", "🙂 $ %"])
def test_empty_has_no_letter(text):
    assert identify_language(text, tuple(TEXTS)) == "empty"


def test_takes_the_most_probable_of_the_list():
    # Whatever it says must not depend on the order in which the languages are named.
    text = "Hotel Restaurant Garage"
    assert identify_language(text, ("en", "fr", "de")) == identify_language(text, ("de", "fr", "en"))


@pytest.mark.parametrize(("label", "asked"), [("wuu", "zh"), ("yue", "zh"), ("arz", "ar")])
def test_varieties_count_to_their_macrolanguage(monkeypatch, label, asked):
    class Fixed:
        def rank(self, text):
            return [(label, 0.6), (asked, 0.2), ("en", 0.2)]

    monkeypatch.setattr("editing.evaluation.language_id._identifier", Fixed)
    assert identify_language("text", ["en", asked]) == asked
    assert identify_language("text", ["en", asked, label]) == label
    assert identify_language("text", ["en", "fr"]) == "other"


@pytest.mark.parametrize("language", TEXTS)
def test_the_second_detector_tells_languages_apart_offline(language, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("the second detector went to the network")

    monkeypatch.setattr("socket.socket.connect", no_network)
    others = tuple(name for name in TEXTS if name != language)
    assert second_opinion(TEXTS[language], tuple(TEXTS)) == language
    assert second_opinion(TEXTS[language] + "\n" + TEXTS[language], tuple(TEXTS)) == language
    assert second_opinion(TEXTS[language], others) == "other"
    assert second_opinion("12 345 ... !", others) == "empty"


@pytest.mark.parametrize(("label", "asked"), [("wuu", "zh"), ("arz", "ar")])
def test_varieties_count_to_their_macrolanguage_for_the_second_too(monkeypatch, label, asked):
    class Fixed:
        def detect(self, text, model, k):
            assert model == "lite"
            return [{"lang": label, "score": 0.6}, {"lang": "en", "score": 0.4}]

    monkeypatch.setattr("editing.evaluation.language_id._second_identifier", Fixed)
    assert second_opinion("text", ["en", asked]) == asked
    assert second_opinion("text", ["en", "fr"]) == "other"


def test_agreement():
    assert agreement(["en", "fr", "empty", "de"], ["en", "other", "empty", "fr"]) == 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The dog sleeps here. The cat does not.", ["The dog sleeps here.", "The cat does not."]),
        ("Yes. The dog sleeps in the house.", ["Yes. The dog sleeps in the house."]),
        ("The dog sleeps here. No.", ["The dog sleeps here. No."]),
        ("孩子们在花园里玩。天开始下雨了。", ["孩子们在花园里玩。", "天开始下雨了。"]),
        ("The dog sleeps here\nwhile the cat is out", ["The dog sleeps here", "while the cat is out"]),
        ("Oui.", ["Oui."]),
        ("... 12 !", []),
        ("", []),
    ],
)
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_sentence_share_sees_a_change_of_language():
    mixed = f"{TEXTS['fr']} {TEXTS['en']} {TEXTS['fr']} {TEXTS['de']}"
    sentence_share = LANGUAGE_IDENTIFICATION.sentence_share
    assert sentence_share(mixed, "fr", tuple(TEXTS)) == 0.5
    assert sentence_share(mixed, "en", tuple(TEXTS)) == 0.25
    assert sentence_share("... !", "fr", tuple(TEXTS)) == 0.0
