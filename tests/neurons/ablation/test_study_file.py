"""The file of an ablation study: read back to what was written, or refused by file and field."""

import math

import pytest
import studies

from neurons.ablation.study_file import study_document, study_of
from neurons.errors import UsageError
from neurons.files.artifact import json_bytes


def test_a_study_comes_back_from_its_file_to_the_byte():
    value = studies.ablation()
    # JSON's form of an infinite specificity.
    infinite = {"value": None, "interval": [15.0, None]}
    value["sets"][0]["specificity"] = value["specificity"] = {**value["specificity"], **infinite}
    study = study_of(value, "a.json")
    assert json_bytes(study_document(study)) == json_bytes(value)
    (one,) = study.sets
    assert one.specificity.value == math.inf and one.specificity.interval == (15.0, math.inf)
    assert [len(draws) for draws in one.controls.values()] == [2]
    assert float(one.own.change[0, 2]) == value["sets"][0]["change"]["ar"]["zh"]
    assert float(one.doses[1].changes.high[2, 1]) == value["sets"][0]["doses"][1]["intervals"]["zh"]["en"][1]
    assert study.metadata["command"] == value["command"] and not {"random", "unit"} & study.metadata.keys()


@pytest.mark.parametrize(
    ("place", "named"),
    [
        (("languages",), "languages"),
        (("settings",), "settings"),
        (("baseline", "en"), "'en'"),
        (("texts", "zh"), "'zh'"),
        (("sets", 0, "method"), "sets.0.method"),
        (("sets", 0, "change"), "sets.0.change"),
        (("sets", 0, "change", "en", "zh"), "'zh'"),
        (("sets", 0, "random_draws", 1, "change"), "sets.0.random_draws.1.change"),
        (("sets", 0, "doses", 0, "share"), "sets.0.doses.0.share"),
        (("sets", 0, "specificity", "own"), "sets.0.specificity.own"),
    ],
    ids=lambda part: ".".join(map(str, part)) if isinstance(part, tuple) else "",
)
def test_a_broken_study_is_refused_by_file_and_field(place, named):
    value = studies.ablation()
    part = value
    for key in place[:-1]:
        part = part[key]
    del part[place[-1]]
    with pytest.raises(UsageError) as refused:
        study_of(value, "broken.json")
    assert str(refused.value).startswith("broken.json: ") and named in str(refused.value)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"sets": 3}, "sets"),
        ({"sets": []}, "sets"),
        ({"languages": []}, "languages"),
        ({"settings": {"way": "median"}}, "median"),
        ({"baseline": {"ar": "much", "en": 1.0, "zh": 1.0}}, "baseline.ar"),
    ],
)
def test_a_foreign_study_is_refused(changed, named):
    with pytest.raises(UsageError, match=rf"^foreign\.json: .*{named}"):
        study_of({**studies.ablation(), **changed}, "foreign.json")


def test_a_dose_has_neurons_of_its_own():
    value = studies.ablation()
    own = dict(zip(value["languages"], (1, 1, 2), strict=True))
    value["sets"][0]["doses"][0]["neurons"] = own
    study = study_of(value, "a.json")
    assert study.sets[0].doses[0].sizes == (1, 1, 2) and study.sets[0].sizes == (1, 2, 3)
    assert study_document(study)["sets"][0]["doses"][0]["neurons"] == own
