"""The page's parts: escaping, colours, numbers, directions of writing, drawings that stand alone."""

import math
import re

import pytest
import studies
from jinja2 import UndefinedError
from matplotlib.figure import Figure

from editing.evaluation.lens import LanguageLens
from editing.evaluation.outcome import OtherLanguage, Refused, Sample
from editing.report.choice_section import choice_content
from editing.report.curves import Curve, Point, _envelope, dose_response_drawing, trade_off
from editing.report.formats import MAX_UNBROKEN, clean, number, plain, span
from editing.report.heat_maps import COOL, FULL, WARM, Cell, HeatMap, colour
from editing.report.inline_svg import drawn, label
from editing.report.lens_figure import lens_figure, lens_table
from editing.report.provenance import provenance
from editing.report.steering_section import samples_by_prompt, steering_content
from editing.report.templating import TEMPLATES, rendered
from editing.report.writing import language_tag, marks, writing_direction
from editing.study.results import Report

PARTS = TEMPLATES.get_template("parts.html.j2").module


def test_templates_escape_and_know_what_they_lack():
    hostile = studies.HOSTILE
    page = studies.Page(PARTS.table(hostile, [hostile, "n"], [[hostile, hostile]], [0, 1]))
    assert page.faults == [] and not page.all("script") and not page.all("img") and page.comments == []
    assert page.texts(hostile) == [[hostile, "n"], [hostile, hostile]]
    page = studies.Page(PARTS.th(hostile) + PARTS.w(hostile) + PARTS.n(hostile) + PARTS.warning(hostile))
    assert {element["text"] for element in page.elements if element["tag"] != "wbr"} == {hostile}
    page = studies.Page(rendered("page", title=hostile, subtitle=hostile, sections=[], generator=hostile))
    (made_by,) = page.all("meta", name="generator")
    assert page.faults == [] and made_by["attributes"]["content"] == page.all("title")[0]["text"] == hostile
    with pytest.raises(UndefinedError):
        rendered("files", files=[])


@pytest.mark.parametrize(
    ("value", "form", "expected"),
    [
        (0.125, "+.2f", "+0.12"),
        (-0.5, "+.1f", "−0.5"),
        (-0.0001, "+.2f", "0.00"),
        (0.0001, "+.2f", "0.00"),
        (-1.5e-12, ".4g", "−1.5e-12"),
        (None, ".2f", "–"),
        (math.nan, ".2f", "–"),
        (math.inf, ".2f", "∞"),
        (-math.inf, ".2f", "−∞"),
        (1234.0, ",.0f", "1,234"),
    ],
)
def test_numbers(value, form, expected):
    assert number(value, form) == expected


def test_settings_in_words():
    value = {
        "layers": list(range(8)),
        "some": [1, 3],
        "on": True,
        "rate": 0.123456,
        "none": None,
        "empty": [],
    }
    expected = "layers 0 to 7, some 1, 3, on yes, rate 0.1235, none none, empty none"
    assert plain(value) == expected
    assert plain("a" * 64) == "a" * 12 + "…"
    assert plain("a" * 31) == "a" * 31
    assert span((3, 1, 2000)) == "1 to 2,000" and span((4, 4)) == "4" and span(()) == "–"


@pytest.mark.parametrize(
    ("name", "tag", "direction"),
    [
        ("ar", "ar", "rtl"),
        ("fr", "fr", "ltr"),
        ("ar_EG", "ar-EG", "rtl"),
        ("ar-Latn", "ar-Latn", "ltr"),
        ("az-Arab", "az-Arab", "rtl"),
        ("pes_Arab", "pes-Arab", "rtl"),
        ("eng_Latn", "eng-Latn", "ltr"),
        ("HE", "HE", "rtl"),
        ("other", None, "auto"),
        ("", None, "auto"),
        ('x" onload="', None, "auto"),
    ],
)
def test_direction_of_writing(name, tag, direction):
    assert language_tag(name) == tag and writing_direction(name) == direction
    assert marks(name) == {"lang": tag, "dir": direction}


def hexadecimal(parts):
    return "#{:02x}{:02x}{:02x}".format(*parts)


def test_colours_grow_from_white_to_the_ends():
    assert colour(0, 2, True) == colour(-3, 2, False) == "#ffffff"
    assert colour(2, 2, True) == colour(5, 2, True) == hexadecimal(WARM)
    assert colour(-2, 2, True) == hexadecimal(COOL) and colour(2, 2, False) == hexadecimal(FULL)
    half = [round(255 + (end - 255) / 2) for end in WARM]
    assert colour(1, 2, True) == hexadecimal(half)
    assert colour(math.nan, 2, True) is None


@pytest.mark.parametrize("end", [WARM, COOL, FULL])
def test_dark_text_is_read_on_every_colour(end):
    def luminance(parts):
        linear = [
            p / 255 / 12.92 if p / 255 <= 0.04045 else ((p / 255 + 0.055) / 1.055) ** 2.4 for p in parts
        ]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    style = TEMPLATES.get_template("style.css").render()
    # On light pages, and on dark ones, where coloured cells keep the light page's ink.
    inks = [re.search(ink, style)[1] for ink in ("--ink: #(.{6});", r"td\[style\] { color: #(.{6}) }")]
    for ink in inks:
        text = [int(ink[i : i + 2], 16) for i in (0, 2, 4)]
        # What WCAG 2 asks of small text.
        assert (luminance(end) + 0.05) / (luminance(text) + 0.05) >= 4.5


def heat_map(**changes):
    cells = [Cell(0.5, "0.5", "[0, 1]"), Cell(-2.0, "-2"), Cell(9.0, "9", plain=True), Cell(math.nan, "–")]
    return HeatMap("map", ["row", *"abcd"], [("a", cells)], "nats", **changes)


def test_a_scale_leaves_out_what_does_not_compare():
    assert (
        heat_map().end == 2 and heat_map(scale=3.0).end == 3 and heat_map(scale=3.0, min_scale=4.0).end == 4
    )
    page = studies.Page(PARTS.heat_map(heat_map()))
    assert page.faults == [] and page.texts("map") == [["row", *"abcd"], ["a", "0.5[0, 1]", "-2", "9", "–"]]
    styles = [element["attributes"].get("style") for element in page.all("td")]
    assert styles[1] == f"background:{hexadecimal(COOL)}" and styles[2:] == [None, None]
    assert "−2.00" in page.all("p")[0]["text"] and "nats" in page.all("p")[0]["text"]
    page = studies.Page(PARTS.heat_map(heat_map(min_scale=4.0, signed=False)))
    assert page.all("p")[0]["text"].startswith("04.00")


def test_tables_scroll_and_name_their_rows():
    page = studies.Page(PARTS.table("caption", ["x", "n"], [["a <b>", "1"], ["c", "2"]], marked=[1]))
    assert page.faults == [] and page.texts("caption") == [["x", "n"], ["a <b>", "1"], ["c", "2"]]
    (box,) = page.all("div", **{"class": "scroll"})
    assert box["attributes"]["tabindex"] == "0" and box["text"].strip().startswith("xn")
    assert [element["text"] for element in page.all("th", scope="row")] == ["a <b>", "c"]
    assert [element["text"] for element in page.all("tr", **{"class": "marked"})] == ["c2"]
    assert [element["attributes"].get("class") for element in page.all("td")] == ["n", "n"]


def test_long_words_may_break_and_stay_whole():
    word = "x" * (2 * MAX_UNBROKEN + 1)
    page = studies.Page(PARTS.th(f"short {word}"))
    assert page.all("th")[0]["text"] == f"short {word}" and len(page.all("wbr")) == 2


@pytest.mark.parametrize(
    ("share", "length"),
    [(0.25, "25.0%"), (1.5, "100.0%"), (1, "100.0%"), (-1, "0.0%"), (math.nan, "0.0%"), (None, "0.0%")],
)
def test_bars(share, length):
    assert f"--share:{length}" in PARTS.bar(share)


def test_samples_stand_together_by_prompt():
    def outcome(name, *samples):
        return studies.outcome(name, 0.5, samples=tuple(Sample(*sample) for sample in samples))

    base = outcome("base", ("One", "un\ndeux", "fr"), ("Two", "", "empty"))
    edit = outcome("edit", ("Two", studies.ARABIC, "ar"), ("One", "x", "other"))
    result = samples_by_prompt([base, edit])
    assert list(result) == ["One", "Two"]
    assert result["One"] == [("base", "un deux", "fr"), ("edit", "x", "other")]
    page = studies.Page(steering_content(Report("en", "ar", 0.96, 100, (base, edit)), "name"))
    first, second = page.all("li")
    assert first["text"] == "Onebase frun deuxedit otherx"
    assert second["text"] == f"Twobase empty(nothing)edit ar{studies.ARABIC}"
    directions = [element["attributes"]["dir"] for element in page.all("dd")]
    assert directions == ["ltr", "auto", "auto", "rtl"]
    assert "lang" not in page.all("dd")[1]["attributes"]


def drawing():
    figure = Figure(figsize=(3, 2))
    axis = figure.subplots()
    axis.plot([1, 2], [3, 4], marker="o", label="x")
    axis.imshow([[1, 2], [3, 4]])
    axis.legend()
    return figure


def test_a_drawing_stands_alone():
    first, second = drawn(drawing(), "one", "says <this>").svg, drawn(drawing(), "two", "that").svg
    assert first == drawn(drawing(), "one", "says <this>").svg
    page = studies.Page(first + second)
    assert page.faults == []
    names = [element["attributes"]["id"] for element in page.elements if "id" in element["attributes"]]
    assert len(names) == len(set(names))
    assert "http" not in first and "xmlns" not in first and "<style" not in first and "<!--" not in first
    assert page.all("svg")[0]["attributes"]["aria-label"] == "says <this>"
    used = re.findall(r'(?:href="#|url\(#)([^")]*)', first)
    assert used and set(used) <= {name for name in names if name.startswith("one-")}
    assert 'href="data:image/png;base64,' in first


def picture(drawing):
    return clean(PARTS.picture(drawing))


@pytest.mark.parametrize(
    "words", ["$\\frac$ 5", "_hidden", "</svg><script>", 'a id="b"', "\x00<!-- -->", studies.CHINESE, "--"]
)
def test_words_of_a_file_are_drawn_as_they_are(words, recwarn):
    points = [Point(words, 0.1, 0.9, chosen=True), Point("other", 0.2, 1.0)]
    page = studies.Page(picture(trade_off(words, points, 0.95, words, words, "n")))
    assert page.faults == [] and not page.all("script") and page.comments == []
    shown = words.replace("\x00", "�")
    drawn = [element["text"].strip() for element in page.all("text")]
    # The legend, and both axes.
    assert drawn.count(shown) == 3
    assert len(page.all("svg")) == 1 and not list(recwarn)
    curve = Curve(words, [1.0], [0.9], [1.1], [0.1])
    page = studies.Page(picture(dose_response_drawing(words, [0.5], [curve], words, "m")))
    assert page.faults == [] and [element["text"].strip() for element in page.all("text")].count(shown) == 1


def test_label_of_many_lines_is_one():
    assert label("a\nb  c") == "a b c"


def test_nothing_to_draw():
    assert trade_off("c", [Point("a", math.nan, 1.0), Point("b", 1.0, math.nan)], 1.0, "y", "x", "n") is None
    assert PARTS.picture(None) == ""
    assert "<svg" in trade_off("c", [Point("a", 0.0, 0.0)], math.nan, "y", "x", "n").svg


def test_provenance_of_anything():
    assert provenance({}) == provenance({"corpus": 3, "settings": [], "packages": "x", "model": 5})
    result = provenance({"corpus": {"digest": "d"}, "corpora": [{"digest": "e", "part": "report"}, 7]})
    assert result.texts == (("e", "report"),)
    result = provenance({"identity": {"model": "f", "corpus": {"choose": "c"}, "seed": 3, "knobs": {}}})
    assert (result.fingerprint, result.texts, result.settings) == ("f", (("c", "choose"),), {"seed": 3})


def test_a_comparison_of_all_ways_has_its_settings_with_it():
    chosen = studies.outcome(
        "hook",
        0.9,
        failures={"empty": 1, "looping": 2},
        relevance={"scorer": "chrF", "mean": 0.4, "steering_score": 0.55},
        others={"zh": OtherLanguage(0.7, 0.9, None, 0.9, 0.0, 8.0)},
        effectiveness=0.9,
        entanglement=0.141,
    )
    tried = (chosen, Refused("bake", {"layer": 1}, "no"))
    result = Report("en", "ar", 1.0, 10, (studies.outcome("base", 0.0), chosen), tried=tried)
    page = studies.Page(choice_content(result.choice, "name"))
    _, *rows = page.texts("Settings tried")
    assert [[row[0], row[1], row[4]] for row in rows] == [
        ["hook", "0.90", "strength 3.5"], ["bake", "–", "layer 1 (no)"],
    ]  # fmt: skip
    assert [element["text"][:4] for element in page.all("tr", **{"class": "marked"})] == ["hook"]
    page = studies.Page(steering_content(result, "name"))
    head, base, hook = page.texts("en to ar, all ways")
    assert head[7:9] == ["effectiveness", "entanglement"]
    assert base[7:9] == ["–", "–"] and hook[7:9] == ["0.90", "0.14"]
    head, base, hook = page.texts("How they write")
    shown = dict(zip(head, hook, strict=True))
    assert (shown["empty"], shown["looping"], shown["relevance (chrF): steering score"]) == ("1", "2", "0.55")
    assert dict(zip(head, base, strict=True))["relevance (chrF): mean"] == "–"
    assert page.texts("Share of answers in the prompt's own language") == [["way", "zh"], ["hook", "0.70"]]
    assert page.texts("NLL rise on each language's text")[0] == ["way", "ar", "zh", "en"]
    assert page.texts("KL of next-token distributions")[2] == ["hook", "0.021"]
    assert Report("en", "ar", 1.0, 10, (chosen,), tried=()).choice is None


def test_the_lens_is_a_figure_and_a_table():
    lens = LanguageLens(
        ("de", "en", "fr", "zh"),
        {"de": 1, "en": 2000, "fr": 3, "zh": 0},
        7,
        {
            "base": ((0.25, 0.5, 0.0, 0.125), (0.0, 0.75, 0.125, 0.0)),
            "edited": ((0.25, 0.5, 0.0, 0.0), (0.0, 0.0, 0.875, 0.0)),
        },
    )
    head, rows = lens_table(lens, "en", "fr")
    assert head[0] == "layer" and len(head) == 7
    assert rows == [
        ["0", "0.500", "0.500", "0.000", "0.000", "0.375", "0.250"],
        ["1", "0.750", "0.000", "0.125", "0.875", "0.000", "0.000"],
    ]
    (axis,) = lens_figure(lens, "en", "fr").axes
    assert [line.get_ydata().tolist() for line in axis.lines[2:4]] == [[0.0, 0.125], [0.0, 0.875]]
    assert [line.get_linestyle() for line in axis.lines] == ["--", "-"] * 3
    report = Report("en", "fr", 1.0, 7, (studies.outcome("base", 0.0),), lens=lens)
    page = studies.Page(steering_content(report, "s"))
    assert page.faults == [] and page.texts("The same in numbers") == [head, *rows]


def test_the_envelope_is_the_most_that_is_reached_at_a_cost_or_less():
    points = [Point("a", 2.0, 0.5), Point("b", 1.0, 0.3), Point("a", 4.0, 0.9), Point("b", 3.0, 0.4)]
    assert _envelope(points) == [(1.0, 0.3), (2.0, 0.5), (3.0, 0.5), (4.0, 0.9)]
