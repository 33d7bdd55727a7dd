"""The page's parts: escaping, colours, numbers, directions of writing, drawings that stand alone."""

import math
import re

import pytest
import studies
from matplotlib.figure import Figure

from editing.report.curves import Curve, Point, doses_picture, trade_off
from editing.report.formats import number, plain, span
from editing.report.inline_svg import inline_svg, label
from editing.report.markup import Markup, element, escaped, joined
from editing.report.matrix import COOL, FULL, WARM, Cell, colour, heat_map, scale_end
from editing.report.page import STYLE
from editing.report.provenance import provenance
from editing.report.samples import Sample, sample_list
from editing.report.steering_results import read_choice, read_steering, read_tried
from editing.report.tables import LONGEST, row_name, share_bar, table
from editing.report.writing import language_tag, marks, writing_direction


def test_text_is_escaped_and_markup_is_not_escaped_again():
    assert element("p", "a < b & c") == "<p>a &lt; b &amp; c</p>"
    assert element("p", element("b", "<")) == "<p><b>&lt;</b></p>"
    assert joined(["<", Markup("<br>")]) == "&lt;<br>"
    assert element("td", "x", class_="n", title='"a" & <b>', lang=None) == (
        '<td class="n" title="&quot;a&quot; &amp; &lt;b&gt;">x</td>'
    )
    assert element("meta", charset="utf-8") == '<meta charset="utf-8">'


def test_what_is_done_to_markup_makes_it_text_again():
    assert escaped(Markup("<b>") + "<i>") == "&lt;b&gt;&lt;i&gt;"
    assert escaped(Markup("<b>").replace("b", "i")) == "&lt;i&gt;"


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

    (ink,) = re.findall("--ink: #([0-9a-f]{6});", STYLE)
    text = [int(ink[i : i + 2], 16) for i in (0, 2, 4)]
    # What WCAG 2 asks of small text.
    assert (luminance(end) + 0.05) / (luminance(text) + 0.05) >= 4.5


def test_a_scale_leaves_out_what_does_not_compare():
    rows = [("a", [Cell(0.5, "0.5"), Cell(-2.0, "-2"), Cell(9.0, "9", plain=True), Cell(math.nan, "–")])]
    assert scale_end(rows) == 2
    page = studies.Page(heat_map("map", "row", list("abcd"), rows, "nats"))
    styles = [one["attributes"].get("style") for one in page.all("td")]
    assert styles[1] == f"background:{hexadecimal(COOL)}" and styles[2:] == [None, None]
    assert "−2.00" in page.all("p")[0]["text"] and "nats" in page.all("p")[0]["text"]
    page = studies.Page(heat_map("map", "row", list("abcd"), rows, "nats", least=4.0))
    assert "−4.00" in page.all("p")[0]["text"]


def test_tables_scroll_and_name_their_rows():
    page = studies.Page(table("caption", ["x", "n"], [["a <b>", "1"], ["c", "2"]], marked=[1]))
    assert page.faults == [] and page.texts("caption") == [["x", "n"], ["a <b>", "1"], ["c", "2"]]
    (box,) = page.all("div", **{"class": "scroll"})
    assert box["attributes"]["tabindex"] == "0" and box["text"].startswith("xn")
    assert [one["text"] for one in page.all("th", scope="row")] == ["a <b>", "c"]
    assert [one["text"] for one in page.all("tr", **{"class": "marked"})] == ["c2"]


def test_long_words_may_break_and_stay_whole():
    word = "x" * (2 * LONGEST + 1)
    page = studies.Page(row_name(f"short {word}"))
    assert page.all("th")[0]["text"] == f"short {word}" and len(page.all("wbr")) == 2


@pytest.mark.parametrize(
    ("share", "length"), [(0.25, "25.0%"), (1.5, "100.0%"), (-1, "0.0%"), (math.nan, "0.0%")]
)
def test_bars(share, length):
    assert f"--share:{length}" in share_bar(share, "text")


def test_samples_stand_together_by_prompt():
    ways = [
        ("base", [Sample("One", "un\ndeux", "fr"), Sample("Two", "", "empty")]),
        ("edit", [Sample("Two", studies.ARABIC, "ar"), Sample("One", "x", "other")]),
    ]
    page = studies.Page(sample_list("en", ways))
    first, second = page.all("li")
    assert first["text"] == "Onebase frun deuxedit otherx"
    assert second["text"] == f"Twobase empty(nothing)edit ar{studies.ARABIC}"
    directions = [one["attributes"]["dir"] for one in page.all("dd")]
    assert directions == ["ltr", "auto", "auto", "rtl"]


def drawing():
    figure = Figure(figsize=(3, 2))
    axis = figure.subplots()
    axis.plot([1, 2], [3, 4], marker="o", label="x")
    axis.imshow([[1, 2], [3, 4]])
    axis.legend()
    return figure


def test_a_drawing_stands_alone():
    first, second = inline_svg(drawing(), "one", "says <this>"), inline_svg(drawing(), "two", "that")
    assert first == inline_svg(drawing(), "one", "says <this>")
    page = studies.Page(first + second)
    assert page.faults == []
    names = [one["attributes"]["id"] for one in page.elements if "id" in one["attributes"]]
    assert len(names) == len(set(names))
    assert "http" not in first and "xmlns" not in first and "<style" not in first and "<!--" not in first
    assert page.all("svg")[0]["attributes"]["aria-label"] == "says <this>"
    used = re.findall(r'(?:href="#|url\(#)([^")]*)', first)
    assert used and set(used) <= {name for name in names if name.startswith("one-")}
    assert 'href="data:image/png;base64,' in first


@pytest.mark.parametrize(
    "words", ["$\\frac$ 5", "_hidden", "</svg><script>", 'a id="b"', "\x00<!-- -->", studies.CHINESE, "--"]
)
def test_words_of_a_file_are_drawn_as_they_are(words, recwarn):
    points = [Point(words, 0.1, 0.9, chosen=True), Point("other", 0.2, 1.0)]
    page = studies.Page(trade_off(words, points, 0.95, words, words, "n"))
    assert page.faults == [] and not page.all("script") and page.comments == []
    shown = words.replace("\x00", "�")
    drawn = [one["text"].strip() for one in page.all("text")]
    # The legend, and both axes.
    assert drawn.count(shown) == 3
    assert len(page.all("svg")) == 1 and not list(recwarn)
    curve = Curve(words, [1.0], [0.9], [1.1], [0.1])
    page = studies.Page(doses_picture(words, [0.5], [curve], words, "m"))
    assert page.faults == [] and [one["text"].strip() for one in page.all("text")].count(shown) == 1


def test_label_of_many_lines_is_one():
    assert label("a\nb  c") == "a b c"


def test_nothing_to_draw():
    assert trade_off("c", [Point("a", math.nan, 1.0), Point("b", 1.0, math.nan)], 1.0, "y", "x", "n") == ""
    assert "<svg" in trade_off("c", [Point("a", 0.0, 0.0)], math.nan, "y", "x", "n")


def test_provenance_of_anything():
    assert provenance({}) == provenance({"corpus": 3, "settings": [], "packages": "x", "model": 5})
    found = provenance({"corpus": {"digest": "d"}, "corpora": [{"digest": "e", "part": "report"}, 7]})
    assert found.texts == (("e", "report"),)
    found = provenance({"identity": {"model": "f", "corpus": {"choose": "c"}, "seed": 3, "knobs": {}}})
    assert (found.fingerprint, found.texts, found.settings) == ("f", (("c", "choose"),), {"seed": 3})


def test_a_comparison_of_all_ways_has_its_settings_with_it():
    chosen = studies.outcome(
        "hook",
        0.9,
        failures={"empty": 1, "looping": 2},
        relevance={"scorer": "chrF", "mean": 0.4, "steering_score": 0.55},
        others={"zh": {"share": 0.7, "ceiling": 0.9, "fluency_gap": None}},
        effectiveness=0.9,
        entanglement=0.141,
    )
    value = {
        "source": "en",
        "target": "ar",
        "ceiling": 1.0,
        "continuations": 10,
        "outcomes": [studies.outcome("base", 0.0).as_json(), chosen.as_json()],
        "tried": [chosen.as_json(), {"name": "bake", "settings": {"layer": 1}, "refused": "no"}],
    }
    result, tried = read_steering(value), read_tried(value)
    way = result.ways[1]
    assert way.failures == {"empty": 1, "looping": 2}
    assert way.relevance == ("chrF", {"mean": 0.4, "steering_score": 0.55})
    assert way.others["zh"]["share"] == 0.7 and math.isnan(way.others["zh"]["fluency_gap"])
    assert way.further["effectiveness"] == 0.9 and result.languages == ["ar", "zh", "en"]
    assert tried.chosen["hook"] == {"strength": 3.5} and tried.tried[1].refused == "no"
    assert (tried.source, tried.target) == ("en", "ar")
    assert read_tried({**value, "tried": []}) is None
    choice = {**value, "chosen": {}, "ceiling": 0.9}
    assert read_choice(choice, "renamed").target == "ar"


def test_a_choice_without_its_numbers_is_refused():
    with pytest.raises(KeyError):
        read_choice({"ceiling": 1.0, "chosen": {}, "tried": [{"name": "x"}]}, "fr")
