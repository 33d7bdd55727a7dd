"""The neurons that are found carry their language: without them it is what the model reads worst."""

import pytest

LANGUAGES = {"en", "fr", "de"}


@pytest.fixture(scope="module")
def studies(ablate):
    contrast, lape = ablate.value["sets"]
    assert (contrast["method"], lape["method"]) == ("gradient-contrast", "lape")
    return {"contrast": contrast, "lape": lape}


def rises(study):
    """Language -> what its own neurons, and as many random ones, cost it; nats a token."""
    return {
        language: (
            study["change"][language][language],
            study["random_draws"][0]["change"][language][language],
        )
        for language in LANGUAGES
    }


def test_each_language_loses_most_by_its_own_neurons(studies):
    assert studies["contrast"]["own_is_largest"] == dict.fromkeys(LANGUAGES, True)
    for own, random in rises(studies["contrast"]).values():
        assert own > 3 * random > 0


def test_lape_beats_random_in_the_smaller_languages(studies):
    """Not those of English, which everything in this model was trained on: +.03 nats a token, random +.01."""
    own_and_random = rises(studies["lape"])
    for language in ("fr", "de"):
        own, random = own_and_random[language]
        assert own > 3 * random > 0
