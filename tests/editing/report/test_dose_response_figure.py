"""The dose-response figure against the numbers that it shows."""

import math
from dataclasses import replace

import pytest
import studies
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from editing.report.curves import COLOURS
from editing.report.dose_response import MAX_TITLE, dose_figure, is_measured


def drawn(curves, ceiling=0.96, base_rate=0.05):
    return dose_figure(curves, "en", "ar", ceiling, base_rate)


def lines(figure):
    """The lines of the methods: those of the axes that are not a single mark, a rule or a star."""
    return [
        line
        for line in figure.axes[0].lines
        if line.get_marker() not in ("*", "None") and line.get_linestyle() != "None"
    ]


def points(line):
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_each_method_has_a_line_through_its_outcomes():
    figure = drawn(studies.dose_curves())
    expected = []
    for doses in studies.DOSES.values():
        expected.append([(share, rise) for _, share, rise in doses])
    assert [points(line) for line in lines(figure)] == expected
    whole = [
        points(line)
        for line in figure.axes[0].lines
        if line.get_linestyle() == "None" and line.get_marker() != "*"
    ]
    assert whole == [[(doses[-1][1], doses[-1][2])] for doses in studies.DOSES.values()]
    (star,) = [line for line in figure.axes[0].lines if line.get_marker() == "*"]
    assert points(star) == [(0.05, 0)]
    assert [0.96, 0.96] in [list(line.get_xdata()) for line in figure.axes[0].lines]


def test_the_largest_rise_of_a_third_language_is_drawn():
    (outcome,) = studies.dose_curves({"hook": ((1.0, 0.5, 0.1),)})["hook"]
    harmful = replace(outcome, nll_rise={**outcome.nll_rise, "de": 0.3, "fr": 0.2})
    assert points(lines(drawn({"hook": [harmful]}))[0]) == [(0.5, 0.3)]


def test_permanent_is_solid_and_the_keyed_edit_is_thickest_and_on_top():
    keyed, hook, baked, prompt = lines(drawn(studies.dose_curves()))
    assert [line.get_linestyle() for line in (keyed, baked)] == ["-", "-"]
    assert [line.get_linestyle() for line in (hook, prompt)] == ["--", "--"]
    others = (hook, baked, prompt)
    assert keyed.get_linewidth() > 2 * max(line.get_linewidth() for line in others)
    assert keyed.get_zorder() > max(line.get_zorder() for line in others)
    assert to_hex(keyed.get_color()) == "#000000"


def test_no_two_of_many_methods_look_alike():
    many = {f"method {i}": ((0.5, 0.2, 0.1), (1.0, 0.4, 0.2)) for i in range(40)}
    styles = {
        (to_hex(line.get_color()), line.get_marker()) for line in lines(drawn(studies.dose_curves(many)))
    }
    assert len(styles) == 40 and {colour for colour, _ in styles} <= set(COLOURS[:-1])


def test_the_legend_has_permanent_edits_first():
    marks = ["", "part of the strength", "the whole strength", "ceiling", "unedited model"]
    permanent, others = (
        ["permanent edits", "keyed edit", r"baked \$x\$"],
        ["hooks and prompts", "hook", "a prompt"],
    )
    assert legend(drawn(studies.dose_curves())) == [*permanent, *others, *marks]
    few = legend(drawn(studies.dose_curves({"hook": ((1.0, 0.5, 0.1),)}), math.nan, math.nan))
    assert few == ["hooks and prompts", "hook", "", "part of the strength", "the whole strength"]


def test_what_was_not_measured_is_left_out():
    curves = studies.dose_curves()
    first, second, third = curves["keyed edit"]
    incomplete = {
        "keyed edit": (replace(first, target_share=math.nan), second, third),
        "hook": (replace(curves["hook"][0], nll_rise={"ar": 1.0, "zh": math.nan, "de": 0.1}),),
        "nothing": (),
    }
    figure = drawn(incomplete)
    assert [points(line) for line in lines(figure)] == [[(0.6, 0.03), (0.9, 0.01)]]
    assert "hook" not in legend(figure) and "nothing" not in legend(figure)
    assert lines(drawn({})) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"target_share": math.nan}, False),
        ({"nll_rise": {"zh": math.nan, "de": 0.1}}, False),
        ({"nll_rise": {"de": 0.1, "zh": math.inf}}, False),
        # Neither is harm.
        ({"nll_rise": {"en": 0.2, "ar": 0.1}}, False),
        ({"nll_rise": {"en": math.nan, "ar": math.nan, "zh": 0.1}}, True),
        ({"fluency_gap": math.nan}, True),
    ],
)
def test_what_counts_as_measured(change, expected):
    assert is_measured(replace(studies.outcome("x", 0.5), **change), "en", "ar") is expected


@pytest.mark.parametrize("largest", [0.02, 0.8, 20.0])
def test_small_harms_have_room_beside_large_ones(largest):
    figure = drawn(
        studies.dose_curves({"a": ((0.5, 0.1, -0.004), (1.0, 0.5, 0.01)), "b": ((1.0, 1.0, largest),)})
    )
    axis = figure.axes[0]
    figure.draw_without_rendering()
    zero, small, large = (
        axis.transAxes.inverted().transform(axis.transData.transform((0, y)))[1] for y in (0, 0.01, largest)
    )
    assert small - zero > 0.15 and zero > 0 and large < 1
    shown = [text.get_text() for text in axis.get_yticklabels()]
    assert {"0", "0.01", "0.03"} <= set(shown) and "−0.01" in shown


def inside(figure: Figure):
    """Whether the legend, the title and the axes are inside the figure and do not overlap."""
    figure.draw_without_rendering()
    sheet, axis = figure.bbox, figure.axes[0]
    boxes = [figure.legends[0].get_window_extent(), axis.get_tightbbox()]
    assert not boxes[0].overlaps(axis.get_window_extent())
    return all(
        sheet.x0 <= box.x0 and box.x1 <= sheet.x1 and sheet.y0 <= box.y0 and box.y1 <= sheet.y1
        for box in boxes
    )


@pytest.mark.parametrize("count", [1, 4, 16, 30])
def test_nothing_is_cut_off(count):
    many = {f"{i} {'x' * 300}": ((0.5, 0.0, 0.1), (1.0, 1.0, 0.2)) for i in range(count)}
    figure = drawn(studies.dose_curves(many))
    assert inside(figure)
    assert figure.axes[0].get_position().width > 0.4
    assert legend(figure)[1] == "0 " + "x" * (MAX_TITLE - 3) + "…"


def test_titles_are_not_read_as_formulas():
    figure = dose_figure(studies.dose_curves(), "$\\frac", "_$x$", 1.0, 0.0)
    figure.draw_without_rendering()
    assert r"\$\frac" in figure.axes[0].get_title() and figure.axes[0].get_xlabel().endswith(r"_\$x\$")
