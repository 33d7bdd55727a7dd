"""Files of evaluations, choices and searches: read back to what was written, or refused by file and field."""

import json
import math

import pytest
import studies

from editing.evaluation.lens import LanguageLens
from editing.evaluation.outcome import OtherLanguage, Outcome, Refused
from editing.study.results import Choice, Report, load_choice, load_reports
from editing.study.search_result import SearchResult, search_document
from neurons.errors import UsageError
from neurons.files.artifact import json_bytes
from neurons.files.json_file import checked, document, read_json

OTHERS = {"zh": OtherLanguage(0.7, 0.9, None, 0.8, 0.1, 12.0)}
OUTCOME = studies.outcome("method", 0.5, others=OTHERS, effectiveness=0.5, failures={"empty": 1})
BASE = studies.outcome("base", 0.0, fluency_gap=math.nan, relevance={"scorer": "chrf", "mean": 0.5})
REFUSED = Refused("bake", {"layer": 1}, "no")
DOSE = studies.outcome("method", 0.25, details={"dose": 0.5})
ABOUT = {"model": "m", "command": "broca ...", "inputs": [], "corpora": [{"digest": "d", "part": "all"}]}
LENS = LanguageLens(
    ("en", "ar", "fr"),
    {"en": 3, "ar": 2, "fr": 0},
    4,
    {"base": ((0.5, 0.125, 0.0), (0.75, 0.0, 0.25)), "edited": ((0.5, 0.0, 0.0), (0.0, 1.0, 0.0))},
)
REPORTS = {
    "evaluate": Report("en", "ar", 0.96, 100, (BASE, OUTCOME), lens=LENS, about=ABOUT),
    "run": Report("en", "ar", 0.96, 100, (BASE, OUTCOME), notes=(), about={**ABOUT, "read": {"en": 3}}),
    "compare": Report(
        "en", "ar", 0.96, 100, (BASE, OUTCOME), ("A note.",), ("method",), (OUTCOME, REFUSED),
        {"method": (DOSE, OUTCOME)}, ABOUT,
    ),
}  # fmt: skip
REPORTS["compare"].curves["method"][1].details["dose"] = 1.0
CHOICE = Choice("en", "ar", 0.96, {"method": {"strength": 3.5}}, (OUTCOME, REFUSED), ABOUT)


def written(path, result):
    path.write_bytes(json_bytes(result))
    return path


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_comes_back_from_its_file_to_the_byte(tmp_path, name):
    path = written(tmp_path / "a.json", document(REPORTS[name]))
    (report,) = load_reports(path)
    assert json_bytes(document(report)) == path.read_bytes()
    assert report.outcomes[1] == OUTCOME and math.isnan(report.outcomes[0].fluency_gap)
    assert report.about == REPORTS[name].about and report.curves == REPORTS[name].curves
    assert (report.notes, report.tried) == (REPORTS[name].notes, REPORTS[name].tried)
    assert report.lens == REPORTS[name].lens


def test_a_list_of_reports_is_several(tmp_path):
    path = written(tmp_path / "report.json", list(map(document, REPORTS.values())))
    assert json_bytes(list(map(document, load_reports(path)))) == path.read_bytes()


def test_a_choice_comes_back_from_its_file_to_the_byte(tmp_path):
    path = written(tmp_path / "choice.json", document(CHOICE))
    choice = load_choice(path)
    assert json_bytes(document(choice)) == path.read_bytes()
    assert [type(tried) for tried in choice.tried] == [Outcome, Refused]


def test_what_was_not_measured_of_a_trial_is_no_zero():
    measured, *_, early = studies.tuned()["trials"]
    assert [measured[name] for name in ("share", "rise", "harm")] == [0.6, 0.02, 0.004]
    assert [early[name] for name in ("share", "rise", "harm")] == [1 / 16, None, None]


def test_a_search_comes_back_from_its_file_to_the_byte(tmp_path):
    for finished in (True, False):
        value = studies.tuned()
        if not finished:
            value |= {"report": None, "finished": False}
        path = written(tmp_path / "tune.json", value)
        search = checked(SearchResult, read_json(path), path)
        assert json_bytes(search_document(search)) == path.read_bytes()
        assert (search.result is None) == (not finished)
    assert search.trials[3].why == "1 of 16" and search.trials[3].fluency_gap is None
    assert search.about["identity"]["seed"] == 0 and "share" not in search.about


def test_figures_that_a_file_lacks_or_has_as_null_were_not_measured(tmp_path):
    value = studies.written(REPORTS["evaluate"])
    del value["outcomes"][0]["agreement"]
    value["outcomes"][0] |= {"target_share": None, "nll_rise": {"ar": None}, "novel": 3}
    (report,) = load_reports(written(tmp_path / "a.json", value))
    base = report.outcomes[0]
    assert all(map(math.isnan, (base.agreement, base.target_share, base.nll_rise["ar"])))


def at(value, *place):
    for key in place[:-1]:
        value = value[key]
    return value, place[-1]


FAULTS = [
    ("source",),
    ("continuations",),
    ("outcomes",),
    ("outcomes", 1, "target_share"),
    ("outcomes", 1, "nll_rise"),
    ("outcomes", 1, "samples", 0, "prompt"),
    ("outcomes", 1, "others", "zh", "ceiling"),
    ("tried", 1, "name"),
    ("curves", "method", 0, "kl"),
]


@pytest.mark.parametrize("place", FAULTS, ids=lambda place: ".".join(map(str, place)))
@pytest.mark.parametrize("fault", ["missing", "another kind"])
def test_a_broken_report_is_refused_by_file_and_field(tmp_path, place, fault):
    value = studies.written(REPORTS["compare"])
    part, key = at(value, *place)
    if fault == "missing":
        del part[key]
    else:
        part[key] = [{"no": "figure"}]
    path = written(tmp_path / "broken.json", value)
    with pytest.raises(UsageError) as refused:
        load_reports(path)
    said = str(refused.value)
    assert said.startswith(f"{path}: ") and "\n" not in said
    assert ".".join(map(str, place[:2])) in said and str(key) in said


def test_doses_without_a_dose_are_refused(tmp_path):
    for dose in (None, "all"):
        value = studies.written(REPORTS["compare"])
        value["curves"]["method"][0]["details"] = {"dose": dose}
        with pytest.raises(UsageError, match=r"curves\.method\.0.*dose"):
            load_reports(written(tmp_path / "a.json", value))


@pytest.mark.parametrize(
    "place", [("trials", 0, "method"), ("report", "goals_met"), ("goals", "rise"), ("front",)]
)
def test_a_broken_search_is_refused_by_field(place):
    value = studies.tuned()
    part, key = at(value, *place)
    part[key] = 3.5 if key != "rise" else "much"
    with pytest.raises(UsageError, match=r"^tune\.json: .*" + r"\.".join(map(str, place))):
        checked(SearchResult, value, "tune.json")


@pytest.mark.parametrize("content", ["", "{", "[]x", "[3]", "3", "null", '{"a": 1}', "[[]]", '"text"'])
def test_a_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "foreign.json"
    path.write_text(content)
    for load in (load_reports, load_choice):
        with pytest.raises(UsageError, match=r"foreign\.json: "):
            load(path)
    with pytest.raises(UsageError, match=r"none\.json"):
        load_choice(tmp_path / "none.json")


def test_a_choice_without_its_figures_is_refused():
    value = {**json.loads(json_bytes(document(CHOICE))), "tried": [{"name": "x"}]}
    with pytest.raises(UsageError, match=r"tried\.0"):
        checked(Choice, value, "choice.json")
