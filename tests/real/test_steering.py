"""English questions in a chat are answered in French; German is answered and read as before.

Of 16 sampled answers in each language; measured: French 0 -> .62, English 1 -> .12, German .69 -> .94.
"""

import pytest


@pytest.fixture(scope="module")
def outcomes(evaluate):
    return evaluate.value["outcomes"]


def test_english_is_answered_in_french(outcomes):
    base, steered = outcomes
    assert base["source_share"] > 0.75
    assert steered["target_share"] > base["target_share"] + 0.125
    assert steered["source_share"] < 0.5


def test_german_is_left_alone(outcomes):
    base, steered = (outcome["others"]["de"] for outcome in outcomes)
    assert base["share"] > 0.375
    assert steered["share"] > 0.375
    rise = outcomes[1]["nll_rise"]
    assert rise["en"] > 1
    assert abs(rise["de"]) < 0.25
    assert outcomes[1]["kl"]["de"] < 0.25
