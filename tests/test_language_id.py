"""Which language a text is in."""

import pytest

from editing.language_id import check_languages, identify_language
from neurons.errors import UsageError

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


def test_check_languages():
    check_languages(("en", "fr", "zh", "ko"))
    with pytest.raises(UsageError, match="qaa, other"):
        check_languages(("en", "qaa", "fr", "other"))


@pytest.mark.parametrize(("label", "asked"), [("wuu", "zh"), ("yue", "zh"), ("arz", "ar")])
def test_varieties_count_to_their_macrolanguage(monkeypatch, label, asked):
    class Fixed:
        def rank(self, text):
            return [(label, 0.6), (asked, 0.2), ("en", 0.2)]

    monkeypatch.setattr("editing.language_id._identifier", Fixed)
    assert identify_language("text", ["en", asked]) == asked
    assert identify_language("text", ["en", asked, label]) == label
    assert identify_language("text", ["en", "fr"]) == "other"
