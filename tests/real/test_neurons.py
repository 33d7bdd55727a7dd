"""The neurons that are found carry their language: without them the model reads it worse."""

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


def test_contrast_finds_neurons_that_matter_in_every_language(studies):
    """French's and German's cost their own language most; English's, in a model of English, may cost all as much."""
    study = studies["contrast"]
    assert study["own_is_largest"]["fr"] and study["own_is_largest"]["de"]
    for own, random in rises(study).values():
        assert own > 3 * max(random, 0.1)


def test_lape_finds_neurons_that_matter_in_the_smaller_languages(studies):
    """Not in English: +.03 nats a token at most, as random ones."""
    own_and_random = rises(studies["lape"])
    assert studies["lape"]["own_is_largest"]["fr"] and studies["lape"]["own_is_largest"]["de"]
    for language in ("fr", "de"):
        own, random = own_and_random[language]
        assert own > 3 * max(random, 0.1)
