"""Steering at fractions of a strength, and the harm of methods at the same target-language rate."""

import json
import math
from dataclasses import replace

import pytest
import studies
import torch
from test_protocol import NEVER, logits

from editing.evaluation.evaluation import Evaluation
from editing.report.run_report import methods_markdown
from editing.report.tables import dose_response_table
from editing.study.candidates import candidate, candidates_of
from editing.study.dose_response import Cost, costs, harm, weaker
from editing.study.protocol import compare_methods
from editing.study.registry import compared, compared_named
from editing.study.results import Report, report_of
from neurons.files.artifact import json_bytes
from neurons.files.json_file import document

ALL = compared()


def test_a_permanent_edit_is_scaled(llama, material):
    (chosen, *_), _ = candidates_of(ALL["keyed"], material)
    base = logits(llama)
    moved = []
    for fraction, weak in weaker(ALL["keyed"], material, chosen, (0.25, 0.5)):
        assert weak.settings == {**chosen.settings, "strength": fraction * chosen.settings["strength"]}
        for scaled, whole in zip(weak.plan.edits, chosen.plan.edits, strict=True):
            torch.testing.assert_close(scaled.left @ scaled.right.T, fraction * whole.left @ whole.right.T)
        with weak.steering():
            moved.append(float((logits(llama) - base).norm()))
        assert torch.equal(logits(llama), base)
    with chosen.steering():
        moved.append(float((logits(llama) - base).norm()))
    assert 0 < moved[0] < moved[1] < moved[2]


@pytest.mark.parametrize(
    "name",
    [name for name, method in ALL.items() if not method.permanent and method.strength_setting is not None],
)
def test_a_hooks_own_strength_is_multiplied(llama, material, name):
    method = ALL[name]
    (chosen, *_), _ = candidates_of(method, material)
    ((fraction, weak),) = weaker(method, material, chosen, (0.5,))
    assert fraction == 0.5
    halved = {method.strength_setting: 0.5 * chosen.settings[method.strength_setting]}
    assert weak.settings == {**chosen.settings, **halved}
    base = logits(llama)
    with weak.steering():
        half = logits(llama)
    with candidate(method, material, weak.settings).steering():
        assert torch.equal(logits(llama), half)
    assert not torch.equal(half, base)


def test_what_has_no_strength_has_no_doses(material):
    (chosen,), _ = candidates_of(ALL["prompt-source"], material)
    assert list(weaker(ALL["prompt-source"], material, chosen, (0.5,))) == []


def test_every_method_but_prompting_has_a_strength():
    without = [
        name for name, method in ALL.items() if not method.permanent and method.strength_setting is None
    ]
    assert without == ["prompt-source", "prompt-target"]


def test_the_protocol_reports_each_fraction(llama, material, parts):
    choosing, reporting = (
        Evaluation(llama, parts[part], "en", "fr", max_prompts=2, new_tokens=4)
        for part in ("choose", "report")
    )
    methods = {**compared_named(["prompt-target", "diffmean", "bake"]), "never": NEVER}
    *_, compared_all = compare_methods(methods, material, choosing, reporting, fractions=(0.5, 0.25))
    titles = [outcome.name for outcome in compared_all.outcomes]
    assert list(compared_all.curves) == titles[1:]
    for outcome in compared_all.outcomes[1:]:
        curve = compared_all.curves[outcome.name]
        assert curve[-1].nll == outcome.nll
        expected = [1.0] if outcome.name.startswith("prompt") else [0.25, 0.5, 1.0]
        assert [one.details["dose"] for one in curve] == expected
    assert "prompt, target language: not at other doses: it has no strength" in compared_all.notes
    report = report_of(json.loads(json_bytes(document(compared_all))), "methods.json")
    assert list(report.curves) == titles[1:] and report.methods == tuple(methods)
    assert [row[:2] for row in dose_response_table(report)[1]][:4] == [
        ["prompt, target language", "1"], ["DiffMean hook", "0.25"], ["DiffMean hook", "0.5"], ["DiffMean hook", "1"],
    ]  # fmt: skip
    assert "| baked DiffMean | 0.25 |" in methods_markdown(report)
    assert "parts of its chosen" not in methods_markdown(replace(report, curves={}))
    assert "parts of its chosen" not in methods_markdown(replace(report, curves=None))
    baked = compared_all.curves["baked DiffMean"]
    assert baked[0].nll != baked[1].nll != baked[2].nll
    *_, without = compare_methods(compared_named(["prompt-target"]), material, choosing, reporting)
    assert without.curves == {}


def outcome(rate, rises, fraction):
    return studies.outcome("", rate, fluency_gap=0.0, nll_rise=rises, details={"dose": fraction})


def test_the_table_sets_the_keyed_edit_beside_each_fraction():
    def at(rate, de, fraction):
        return outcome(rate, {"en": 9.0, "fr": 8.0, "de": de}, fraction)

    curves = {
        "keyed edit": (at(0.5, 0.01, 0.5), at(0.9, 0.02, 1.0)),
        "other": (at(0.0, 0.3, 0.25), at(0.4, 0.3, 0.5), at(1.0, 0.4, 1.0)),
    }
    head, rows = dose_response_table(Report("en", "fr", 1.0, 2, (at(0.0, 0.0, 0.0),), curves=curves))
    assert head[-1] == "keyed edit's at that share"
    assert [row[-1] for row in rows] == ["-", "-", "-", "+0.010", "-"]
    assert rows[3] == ["other", "0.5", "0.40", "+0.00", "+0.300", "+0.010"]
    # Without a third language there is no harm.
    (pair,) = curves["other"][1:2]
    pair = replace(pair, nll_rise={"en": 9.0, "fr": 8.0})
    _, rows = dose_response_table(Report("en", "fr", 1.0, 2, (pair,), curves={"other": (pair,)}))
    assert rows == [["other", "0.5", "0.40", "+0.00", "-"]]


def test_costs_at_the_same_rate():
    def at(rate, de, fraction, ar=-1.0):
        return outcome(rate, {"en": 9.0, "fr": 8.0, "de": de, "ar": ar}, fraction)

    assert harm(at(0, 0.2, 1.0), "en", "fr") == 0.2
    assert harm(at(0, 0.2, 1.0, ar=0.3), "en", "fr") == 0.3
    assert math.isnan(harm(outcome(0, {"en": 1.0, "fr": 1.0}, 1.0), "en", "fr"))
    curves = {
        "reference": [at(0.1, 0.01, 0.25), at(0.6, 0.03, 0.5), at(0.9, 0.02, 1.0)],
        "other": [at(0.0, 0.0, 0.25), at(0.05, 0.5, 0.5), at(0.6, 0.1, 0.75), at(0.95, 0.2, 1.0)],
    }
    assert costs(curves, "reference", "en", "fr") == (
        Cost("other", 0.5, 0.05, 0.5, 0.01),
        # Harm is not monotonic: full strength does less harm than half of it.
        Cost("other", 0.75, 0.6, 0.1, 0.02),
        Cost("other", 1.0, 0.95, 0.2, None),
    )
    assert [cost.fraction for cost in costs(curves, "reference", "en", "fr", min_rate=0.1)] == [0.75, 1.0]
