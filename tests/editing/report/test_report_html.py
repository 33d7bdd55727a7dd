"""The page of a study: its numbers, escaping, what it loads, and what it refuses."""

import json
import re
import shutil

import pytest
import studies
import torch
from click.testing import CliRunner

from cli.report import command
from editing.plans.plan import ModuleEdit, make_plan
from editing.report.findings import read_findings
from editing.report.provenance_section import files_content, provenance_content
from editing.report.study import study_page
from neurons.ablation.report import as_markdown
from neurons.ablation.study_file import study_of
from neurons.errors import BrocaError, UsageError
from neurons.files.artifact import json_bytes
from neurons.neuron_sets.neuron_set import neuron_set


def page_of(directory):
    text = study_page(read_findings(directory)).decode()
    return text, studies.Page(text)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with one of every result, which stays as it is."""
    directory = tmp_path_factory.mktemp("directory") / "study"
    directory.mkdir()
    studies.write_run(directory)
    (directory / "ablation.json").write_bytes(json_bytes(studies.ablation()))
    (directory / "tuned").mkdir()
    (directory / "tuned" / "tune.json").write_bytes(json_bytes(studies.tuned()))
    return directory


@pytest.fixture
def study(directory, tmp_path):
    """A copy of it, to be changed."""
    shutil.copytree(directory, tmp_path / "study")
    return tmp_path / "study"


@pytest.fixture(scope="module")
def shown(directory):
    """(text of its page, the page)."""
    return page_of(directory)


def numbers(row):
    """Cells as numbers, None where there is none."""
    matches = (re.search(r"[+−]?\d[\d,]*\.?\d*", cell) for cell in row)
    return [
        None if match is None else float(match[0].replace("−", "-").replace(",", "")) for match in matches
    ]


def test_every_element_is_closed_and_named_once(shown):
    _, page = shown
    assert page.faults == [] and page.comments == []
    names = [element["attributes"]["id"] for element in page.elements if "id" in element["attributes"]]
    assert len(names) == len(set(names))
    links = [element["attributes"]["href"] for element in page.all("a")]
    assert links and all(link.startswith("#") and link[1:] in names for link in links)
    # What a drawing refers to within itself is there.
    assert all(
        element["attributes"]["href"][1:] in names
        for element in page.elements
        if element["tag"] == "use" and element["attributes"]["href"].startswith("#")
    )
    assert page.all("use")


def test_nothing_is_asked_from_anywhere(shown):
    text, page = shown
    assert "http" not in text.lower() and "//" not in re.sub(r"base64,[^\"]*", "", text)
    assert "@import" not in text and not page.all("script")
    sources = [element["attributes"].get(name, "") for element in page.elements for name in ("src", "href")]
    assert all(source == "" or source.startswith(("#", "data:")) for source in sources)
    assert not [name for element in page.elements for name in element["attributes"] if name.startswith("on")]
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", text)


def test_steering_figures_are_those_of_the_file(shown):
    _, page = shown
    head, *rows = page.texts("en to ar, all ways")
    assert head[:3] == ["way", "share ar", "share en"]
    assert [row[0] for row in rows] == ["base", "keyed edit", "hook"]
    by_name = dict(zip(head, rows[1], strict=True))
    assert by_name["share ar"] == "0.97" and by_name["fluency gap"] == "+0.25"
    assert by_name["NLL rise ar"] == "+0.012" and by_name["largest third NLL rise"] == "−0.034"
    assert by_name["largest KL"] == "0.021"
    assert by_name["components"] == "12" and by_name["‖ΔW‖/‖W‖"] == "0.004"
    assert dict(zip(head, rows[0], strict=True))["fluency gap"] == "–"
    head, _, keyed, _ = page.texts("NLL rise on each language's text")
    assert head == ["way", "ar", "zh", "en"]
    assert numbers(keyed[1:]) == [0.012, -0.034, 1.5]


PARTS = [{"digest": part[0] * 64, "part": part} for part in ("estimate", "choose", "report")]


@pytest.mark.parametrize(
    ("part", "warned"), [("report", 0), ("choose", 1), ("estimate", 1), ("all", 1), (None, 0)]
)
def test_the_part_that_is_measured_is_none_of_those_that_were_read_besides(tmp_path, part, warned):
    """A file without a part: the page says nothing of it."""
    text = {} if part is None else {"corpus": {"digest": "r" * 64, "part": part, "languages": ["en", "ar"]}}
    files = {"steering.json": {**studies.dosed(), "corpora": PARTS}, "ablation.json": studies.ablation()}
    for name, document in files.items():
        document.pop("corpus", None)
        (tmp_path / name).write_bytes(json_bytes({**document, **text}))
    _, page = page_of(tmp_path)
    warnings = [element["text"] for element in page.all("p", **{"class": "warning"})]
    assert len(warnings) == 2 * warned and all("not a result" in text for text in warnings)
    named = {None: "", "all": "of all parts"}.get(part, f"of the part “{part}”")
    first = [
        element["text"]
        for element in page.all("p")
        if "ceiling of ar" in element["text"] or "ablated" in element["text"]
    ]
    assert len(first) == 2 and all(named in text for text in first)
    assert part is not None or not any("part" in text for text in first)


def test_a_plan_is_told_with_its_text_and_model(study):
    plan = make_plan(
        [ModuleEdit(0, "mlp", (3,), column_scale=torch.ones(8))],
        {
            "method": "scale",
            "fingerprint": "a" * 16,
            "settings": {"corpus": {"digest": "b" * 64, "part": "estimate"}},
        },
    )
    plan.save(study / "scaled.safetensors")
    _, page = page_of(study)
    rows = {row[0]: row[1:3] for row in page.texts("Made of what")}
    assert rows["scaled.safetensors"] == ["a" * 16, f"estimate {'b' * 12}"]
    assert rows["edit-ar.safetensors"] == ["0123456789abcdef", "–"]


def test_a_run_is_shown_once_though_its_report_json_says_it_again(shown, study):
    _, page = shown
    titles = [element["text"] for element in page.all("h2")]
    assert titles.count("Steering: en to ar (measured-ar.json)") == 1
    assert not any("report.json" in title for title in titles)
    (study / "measured-ar.json").unlink()
    assert [named.file for named in read_findings(study).steering] == ["report.json"]


def test_the_sources_own_rise_does_not_set_the_scale(shown):
    _, page = shown
    cells = page.table("NLL rise on each language's text")[2]
    assert "style" not in cells[3]["attributes"]
    # 0.034 of 0.1, where the scale ends at the least, from white to #67a9cf.
    expected = [round(255 + 0.34 * (end - 255)) for end in (0x67, 0xA9, 0xCF)]
    assert cells[2]["attributes"]["style"] == "background:#{:02x}{:02x}{:02x}".format(*expected)


def test_text_is_in_its_own_direction(shown):
    _, page = shown
    (arabic,) = [element for element in page.all("dd") if element["text"] == studies.ARABIC][:1]
    assert arabic["attributes"]["lang"] == "ar" and arabic["attributes"]["dir"] == "rtl"
    (chinese,) = [element for element in page.all("dd") if element["text"] == studies.CHINESE]
    assert chinese["attributes"]["lang"] == "zh" and chinese["attributes"]["dir"] == "ltr"
    prompts = page.all("p", **{"class": "prompt"})
    assert prompts and all(
        (element["attributes"]["lang"], element["attributes"]["dir"]) == ("en", "ltr") for element in prompts
    )
    assert page.all("html")[0]["attributes"]["lang"] == "en"


def test_ablation_figures_are_those_of_the_file(shown, directory):
    document = json.loads((directory / "ablation.json").read_text())
    (neuron_set,) = document["sets"]
    _, page = shown
    head, *rows = page.texts("neurons: rise of each language's NLL")
    assert head[1:4] == list(studies.LANGUAGES)
    for language, row in zip(studies.LANGUAGES, rows, strict=True):
        assert row[0] == f"{language} ablated"
        expected = [neuron_set["change"][language][other] for other in studies.LANGUAGES]
        assert numbers(row[1:4]) == pytest.approx(expected, abs=5.1e-4)
        low, high = neuron_set["intervals"][language][language]
        assert f"[{low:+.3f}, {high:+.3f}]" in row[1 + studies.LANGUAGES.index(language)]
        draws = [draw["change"][language][language] for draw in neuron_set["random_draws"]]
        assert numbers(row[4:]) == pytest.approx(
            [neuron_set["neurons"][language], sum(draws) / 2], abs=5.1e-5
        )
    head, first, second = page.texts("neurons: own language (mean of the others)")
    change = neuron_set["doses"][0]["change"]
    others = (change["ar"]["en"] + change["ar"]["zh"]) / 2
    assert first[0] == "50 %" and first[2] == f"{change['ar']['ar']:+.3f} ({others:+.3f})"
    assert second[0] == "100 %"
    assert "20.00 [15.00, 25.00]" in page.texts("Neuron sets side by side")[1]


def test_an_infinite_specificity_and_a_language_without_neurons(tmp_path):
    value = studies.ablation()
    (one,) = value["sets"]
    one["change"]["ar"] = dict.fromkeys(studies.LANGUAGES, 0.0)
    one["specificity"]["interval"] = [137.3, None]
    (tmp_path / "ablation.json").write_bytes(json_bytes(value))
    _, page = page_of(tmp_path)
    assert page.texts("Neuron sets side by side")[1][5:] == ["20.00 [137.30, ∞]", "2 of 3"]
    row = "+1.0500 | +0.0500 | 20.00 [137.30, inf] | 2 of 3 |"
    assert row in as_markdown(study_of(value, "ablation.json"))


def test_search_figures_are_those_of_the_file(shown):
    _, page = shown
    _, *rows = page.texts("All trials")
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert rows[1][2:] == ["0.98", "+0.20", "+0.020", "0.0060", "strength 4"]
    assert rows[3][2:] == ["0.06", "–", "–", "–", "strength 1 (1 of 16)"]
    front = page.table("The Pareto front")
    assert [row[0]["text"] for row in front[1:]] == ["0", "1"]
    text = " ".join(element["text"] for element in page.all("p"))
    assert "4 trials, 1 of them given up" in text and "share at least 0.95 of the ceiling" in text
    assert "Trial 1 was chosen: the least harmful" in text
    assert "Goals not met there: rise." in text
    marked = [
        element for element in page.all("tr", **{"class": "marked"}) if element["text"].startswith("1keyed")
    ]
    assert len(marked) == 2


def test_a_trial_that_changes_nothing_was_not_given_up(tmp_path):
    value = studies.tuned()
    value["trials"][3] |= {"state": "changes nothing", "found": 0, "continuations": 0}
    (tmp_path / "tune.json").write_bytes(json_bytes(value))
    _, page = page_of(tmp_path)
    (paragraph,) = [element["text"] for element in page.all("p") if element["text"].startswith("4 trials")]
    assert "0 of them given up" in paragraph and "1 without any change" in paragraph
    assert page.texts("All trials")[4][2] == "–"


def test_choices_are_told_apart_from_results(shown):
    _, page = shown
    _, *rows = page.texts("Settings tried; those set off were chosen")
    assert [[row[0], row[4]] for row in rows] == [
        ["keyed edit", "strength 2"],
        ["keyed edit", "strength 3.5"],
        ["Steer2Edit", "alpha 0.8 (nothing changes)"],
    ]
    table = page.table("Settings tried; those set off were chosen")
    marked = [element["text"] for element in page.all("tr", **{"class": "marked"})]
    assert (
        any(text.startswith("keyed edit") and text.endswith("strength 3.5") for text in marked)
        and len(table) == 4
    )
    # The rise of the source, 1.5, is no harm.
    assert rows[1][3] == "+0.012"


def test_neuron_maps(shown):
    _, page = shown
    head, *rows = page.texts("Where they lie")
    assert head == ["language", "0", "1"]
    assert rows == [["ar", "1", "1"], ["en", "1", ""], ["zh", "", ""]]
    assert page.texts("What languages share")[1] == ["ar", "2", "0.50", "0.00"]
    warnings = [element["text"] for element in page.all("p", **{"class": "warning"})]
    assert "No neuron was found for zh." in warnings
    assert page.texts("Modules that change")[1] == ["1", "MLP output", "1", "0", "1.5", "0.5"]


def test_settings_fingerprints_and_commands(shown):
    text, page = shown
    assert text.count("0123456789abcdef") >= 1 and "d" * 64 in text and "f" * 64 in text
    commands = [element["text"] for element in page.all("pre")]
    assert "broca ablate model --neurons neurons.safetensors" in commands
    assert "broca tune model --source en --target ar" in commands
    assert any('source = "en"\ntargets = ["ar"]' in command for command in commands)
    files = {row[0]: row[1] for row in page.texts("Files of the directory")[1:]}
    assert files["checkpoint-ar/"] == "checkpoint" and files["tuned/tune.json"] == "search"
    assert files["report.md"] == "text, not read" and files["run.json"] == "stages of a run: measure ar"


def test_files_of_two_models_are_not_passed_over(study):
    value = {**studies.ablation(), "fingerprint": "another"}
    (study / "other.json").write_bytes(json_bytes(value))
    page = studies.Page(provenance_content(read_findings(study)))
    assert any("more than one model" in element["text"] for element in page.all("p", **{"class": "warning"}))


def test_hostile_text_stays_text(tmp_path):
    directory = tmp_path / "<b>study & co"
    directory.mkdir()
    hostile = studies.HOSTILE
    studies.write_run(directory, name=hostile, edited=hostile, text=hostile, prompt=hostile)
    (directory / "ablation.json").write_bytes(json_bytes(studies.ablation(hostile, hostile)))
    (directory / "tune.json").write_bytes(json_bytes(studies.tuned(hostile)))
    (directory / "<i>.json").write_text("{")
    _, page = page_of(directory)
    assert page.faults == [] and page.comments == []
    assert not page.all("script") and not page.all("img") and not page.all("b") and not page.all("i")
    assert not [name for element in page.elements for name in element["attributes"] if name.startswith("on")]
    assert page.all("h1")[0]["text"] == "Study: <b>study & co"
    words = " ".join(hostile.split())
    assert any(element["text"] == words for element in page.all("dd"))
    assert any(element["text"] == hostile for element in page.all("pre"))


def test_control_characters_and_surrogates_do_not_get_in(tmp_path):
    studies.write_run(tmp_path, text="one\x00two\x1b[31m three\x85")
    path = tmp_path / "measured-ar.json"
    path.write_text(path.read_text().replace("want to sleep.", r"\ud800 tail ￾"))
    content = study_page(read_findings(tmp_path))
    text = content.decode("utf-8")
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff￾]", text)
    assert "one�two�[31m three" in text and "� tail �" in text


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("broken.json", "{", "not readable as JSON"),
        ("other.json", '{"a": 1}', "JSON of another kind"),
        ("list.json", "[]", "JSON of another kind"),
        ("half.json", '{"outcomes": [{"name": "x"}], "target": "fr"}', "source is missing"),
        ("shape.json", '{"sets": 3, "baseline": [], "languages": []}', "not understood"),
        (
            "endless.json",
            '{"source":"a","target":"b","ceiling":1,"continuations":1e999,"outcomes":[]}',
            "continuations should be a finite number",
        ),
        ("trials.json", '{"trials": [3], "front": []}', "not understood"),
        ("weights.safetensors", "nonsense", "not a readable safetensors file"),
        ("notes.docx", "", "no file of Broca's"),
    ],
)
def test_what_is_not_understood_is_named(study, name, content, reason):
    (study / name).write_text(content)
    findings = read_findings(study)
    (file,) = [file for file in findings.files if not file.understood]
    assert file.name == name and file.kind.startswith("not understood") and reason in file.kind
    page = studies.Page(files_content(findings))
    (warning,) = page.all("p", **{"class": "warning"})
    assert warning["text"] == f"Not understood, and not on this page: {name}."
    assert page.texts("Files of the directory")[1][0] == name


def test_equal_studies_give_equal_bytes(study, tmp_path):
    first = study_page(read_findings(study))
    (study / "report.html").write_bytes(first)
    assert study_page(read_findings(study)) == first
    moved = tmp_path / "elsewhere" / "study"
    moved.parent.mkdir()
    study.rename(moved)
    assert study_page(read_findings(moved)) == first


def test_a_file_that_cannot_be_shown_is_named(tmp_path, monkeypatch):
    members = {"fr": torch.tensor([[0, 1]])}
    neurons = neuron_set(members, {"fr": torch.ones(1)}, 1, 4, {"method": "lape"})
    neurons.save(tmp_path / "odd.safetensors")
    # Files are checked when they are read, so no known file leads here.
    monkeypatch.setattr("editing.report.study.neurons_content", lambda *_: {}["neurons"])
    with pytest.raises(BrocaError, match=r"^odd.safetensors: cannot be shown"):
        study_page(read_findings(tmp_path))


def test_a_method_is_no_formula(tmp_path):
    edit = ModuleEdit(0, "mlp", (1,), column_scale=torch.tensor([1.0, 0.0]))
    make_plan([edit], {"method": "$\\frac$ <b>", "settings": {}, "fingerprint": "f"}).save(
        tmp_path / "edit.safetensors"
    )
    _, page = page_of(tmp_path)
    assert page.faults == [] and not page.all("b")
    assert {"$\\frac$ <b>", "neurons"} <= {element["text"] for element in page.all("text")}


def dosed_page(directory, value):
    (directory / "methods.json").write_bytes(json_bytes(value))
    return page_of(directory)


@pytest.mark.parametrize(("name", "heading"), [("mine", "mine (lape)"), ("lape", "lape")])
def test_a_set_is_headed_by_its_name_and_what_the_name_does_not_say(tmp_path, name, heading):
    (tmp_path / "ablation.json").write_bytes(json_bytes(studies.ablation(name)))
    _, page = page_of(tmp_path)
    assert heading in [element["text"] for element in page.all("h3")]


def section(page):
    """What stands beneath the heading of the doses: the texts of its paragraphs."""
    heads = [element["text"] for element in page.elements if element["tag"] in ("h2", "h3", "p")]
    return heads[heads.index("At parts of the strength") + 1 :]


def beside_keyed(base=0.05):
    """The rows as they are defined, and at how many the keyed edit costs less, the same, more, or falls short."""
    rows, counted = [], [0, 0, 0, 0]
    for method, doses in studies.DOSES.items():
        for dose, share, rise in doses if method != "keyed edit" else ():
            if share <= base:
                continue
            keyed = [cost for _, reached, cost in studies.DOSES["keyed edit"] if reached >= share]
            counted[3 if not keyed else 0 if min(keyed) < rise else 2 if min(keyed) > rise else 1] += 1
            rows.append([method, 100 * dose, share, dose / 10, rise, min(keyed) if keyed else None])
    return rows, counted


def test_doses_stand_beside_the_keyed_edit(tmp_path):
    _, page = dosed_page(tmp_path, studies.dosed())
    assert page.faults == []
    head, *rows = page.texts("Every dose beside the keyed edit's")
    assert head == ["way", "dose", "share ar", "fluency gap", "harm", "keyed edit's harm"]
    keyed = [
        ["keyed edit", 100 * dose, share, dose / 10, rise, None]
        for dose, share, rise in studies.DOSES["keyed edit"]
    ]
    others, (less, same, more, missed) = beside_keyed()
    assert [row[0] for row in rows] == [row[0] for row in keyed + others]
    for row, expected in zip(rows, keyed + others, strict=True):
        shown = numbers(row[1:])
        # The gap has two digits.
        assert shown[2] == pytest.approx(expected[3], abs=5.1e-3)
        del shown[2], expected[3]
        assert shown == pytest.approx(expected[1:])
    assert [row[5] for row in rows][: len(keyed)] == [""] * len(keyed)
    assert [row[5] for row in rows].count("not reached") == missed == 1
    assert len(page.all("tr", **{"class": "marked"})) == len(keyed)
    assert (
        f"{len(others)} doses of other ways reach a larger share than the unedited model: the keyed edit, at the "
        f"same share or more, costs less at {less}, the same at {same}, more at {more}, does not reach the share at {missed}."
    ) in section(page)
    (svg,) = page.all("svg")
    assert "Harm against the share of answers in ar" in svg["attributes"]["aria-label"]
    words = [element["text"].strip() for element in page.all("text")]
    assert all(words.count(method) == 1 for method in studies.DOSES)


def test_one_dose_is_one(tmp_path):
    doses = {method: studies.DOSES[method] for method in ("keyed edit", "a prompt")}
    _, page = dosed_page(tmp_path, studies.dosed(doses))
    expected = (
        "1 dose of another way reaches a larger share than the unedited model: the keyed edit, at the same "
    )
    assert expected + "share or more, costs less at 0, more at 1." in section(page)
    _, page = dosed_page(tmp_path, studies.dosed(doses, base=0.99))
    assert "No dose of another way reaches a larger share than the unedited model." in section(page)


def test_doses_without_the_keyed_edit(tmp_path):
    doses = {method: curve for method, curve in studies.DOSES.items() if method != "keyed edit"}
    _, page = dosed_page(tmp_path, studies.dosed(doses))
    head, *rows = page.texts("Every dose; those that")
    assert head == ["way", "dose", "share ar", "fluency gap", "harm"]
    expected = [(method, share) for method, curve in doses.items() for _, share, _ in curve if share > 0.05]
    assert [(row[0], float(row[2])) for row in rows] == expected
    assert "keyed" not in " ".join(section(page)) and len(page.all("svg")) == 1


def test_without_doses_the_page_stays_as_it_was(tmp_path):
    value = studies.dosed()
    _, page = dosed_page(tmp_path, value)
    dosed = [element["text"] for element in page.elements if element["tag"] in ("h3", "figcaption", "dt")]
    pages = set()
    for curves in ({}, None, "absent"):
        changed = {key: field for key, field in value.items() if key != "curves"}
        (tmp_path / "methods.json").write_bytes(
            json_bytes(changed if curves == "absent" else {**changed, "curves": curves})
        )
        text, page = page_of(tmp_path)
        pages.add(re.sub("[0-9a-f]{16,}", "", text))
        assert not page.all("svg")
        plain = [element["text"] for element in page.elements if element["tag"] in ("h3", "figcaption", "dt")]
        added = [text for text in dosed if text not in plain]
        assert added[0] == "At parts of the strength" and len(added) == 3
        assert [text for text in dosed if text not in added] == plain
    assert len(pages) == 1


def test_doses_with_figures_missing(tmp_path):
    value = studies.dosed()
    value["curves"]["hook"][1]["target_share"] = None
    value["curves"]["hook"][2]["nll_rise"]["zh"] = None
    value["curves"]["a prompt"][0]["fluency_gap"] = None
    _, page = dosed_page(tmp_path, value)
    assert "Left out, since a figure of them is missing: 2 of 10 doses." in section(page)
    rows = page.texts("Every dose beside the keyed edit's")
    assert not [row for row in rows if row[0] == "hook"]
    assert [row[3] for row in rows if row[0] == "a prompt"] == ["–"]
    for doses in value["curves"].values():
        for outcome in doses:
            outcome["target_share"] = None
    _, page = dosed_page(tmp_path, value)
    assert "Left out, since a figure of them is missing: 10 of 10 doses." in section(page)
    assert page.faults == [] and not page.all("svg")
    value["curves"] = {"hook": [], "keyed edit": []}
    _, page = dosed_page(tmp_path, value)
    assert page.faults == [] and not page.all("svg")


def test_a_ceiling_and_a_base_that_were_not_measured(tmp_path):
    value = {**studies.dosed(), "ceiling": None}
    value["outcomes"][0]["target_share"] = None
    _, page = dosed_page(tmp_path, value)
    rows = page.texts("Every dose beside the keyed edit's")
    # Without a base rate, any rate above 0 counts.
    assert [row[1] for row in rows if row[0] == "hook"] == ["50 %", "100 %"]
    words = [element["text"].strip() for element in page.all("text")]
    assert "ceiling" not in words and "unedited model" not in words and "keyed edit" in words


def test_hostile_words_among_doses_stay_words(tmp_path):
    hostile = studies.HOSTILE
    value = studies.dosed(
        {**studies.DOSES, hostile: ((0.5, 0.3, 0.1), (1.0, 0.9, 0.2)), "_": ((1.0, 0.4, 0.1),)}
    )
    value["source"] = hostile
    _, page = dosed_page(tmp_path, value)
    assert page.faults == [] and page.comments == []
    assert not page.all("script") and not page.all("img")
    assert not [name for element in page.elements for name in element["attributes"] if name.startswith("on")]
    assert hostile in [row[0] for row in page.texts("Every dose beside the keyed edit's")]
    words = [element["text"].strip() for element in page.all("text")]
    assert [word for word in words if word.endswith("…")] and "_" in words


def test_the_same_ways_with_more_measured_are_another_measurement(tmp_path):
    value = studies.dosed()
    base, *ways = value["outcomes"]
    judged = [base, *({**way, "relevance": {"scorer": "judge", "mean": 0.5}} for way in ways)]
    for name, document in (
        ("a", {**value, "curves": {}}),
        ("b", value),
        ("c", {**value, "notes": ["Said again."]}),
        ("d", {**value, "curves": {}, "outcomes": judged}),
    ):
        (tmp_path / f"{name}.json").write_bytes(json_bytes(document))
    assert [named.file for named in read_findings(tmp_path).steering] == ["a.json", "b.json", "d.json"]
    _, page = page_of(tmp_path)
    assert page.faults == [] and len(page.all("svg")) == 1


def test_two_pictures_of_doses_do_not_share_names(tmp_path):
    (tmp_path / "a.json").write_bytes(json_bytes(studies.dosed()))
    (tmp_path / "b.json").write_bytes(json_bytes({**studies.dosed(), "continuations": 50}))
    _, page = page_of(tmp_path)
    names = [element["attributes"]["id"] for element in page.elements if "id" in element["attributes"]]
    assert len(page.all("svg")) == 2 and len(names) == len(set(names))


@pytest.mark.parametrize("content", [None, "", "a picture"])
def test_a_directory_without_results_is_refused(tmp_path, content):
    directory = tmp_path / "nothing"
    if content is not None:
        directory.mkdir()
    if content:
        (directory / "picture.png").write_text(content)
    with pytest.raises(UsageError, match="nothing: "):
        read_findings(directory)


def test_command(study, tmp_path):
    (study / "strange.json").write_text("{}")
    done = CliRunner().invoke(command, [str(study)])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(study / "report.html")
    assert "strange.json: not understood" in done.stderr
    first = (study / "report.html").read_bytes()
    done = CliRunner().invoke(command, [str(study), "--out", str(tmp_path / "page.html"), "--json"])
    value = json.loads(done.stdout)
    assert value["not_understood"] == ["strange.json"] and value["bytes"] == len(first)
    assert value["shown"]["searches"] == ["tuned/tune.json"]
    # The first page in the directory is no part of the study.
    assert (tmp_path / "page.html").read_bytes() == first


def test_warnings_name_a_few_files_and_count_the_others(study):
    for number in range(13):
        (study / f"strange{number:02}.docx").write_text("")
    lines = CliRunner().invoke(command, [str(study)]).stderr.splitlines()
    assert len(lines) == 11 and "strange09.docx" in lines[9] and "3 more" in lines[10]


def test_command_refuses_another_ending(study):
    done = CliRunner().invoke(command, [str(study), "--out", "page.pdf"])
    assert isinstance(done.exception, UsageError) and "page.pdf" in str(done.exception)
